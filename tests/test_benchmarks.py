"""The benchmarks run, write what they promise, and compare like with like."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
QUICK = ["--size", "tiny", "--steps", "2", "--threads", "1"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def run_benchmark(name: str, *options: str) -> dict[str, Any]:
        module = importlib.import_module(name)
        module.main([*QUICK, "--json", "--output", str(tmp_path), *options])
        printed = json.loads(capsys.readouterr().out)
        (written,) = tmp_path.glob(f"{name}-*.json")
        assert printed == json.loads(written.read_text())
        facts = {"device", "cpu", "date", "commit", "versions", "model", "settings", "load_average"}
        assert facts < printed.keys()
        return printed

    return run_benchmark


def assert_timed(run: dict[str, Any], ways: set[str], peers: set[str]) -> None:
    assert run["seconds"].keys() == ways
    assert run["times_faster"].keys() == peers
    for clocks in (*run["seconds"].values(), *run["times_faster"].values()):
        for spread in clocks.values():
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_dpo_steps_are_the_same_step(run: Any) -> None:
    result = run("dpo", "--no-memory")
    assert [r["mode"] for r in result["runs"]] == ["stored reference", "reference in step"]
    for r in result["runs"]:
        assert_timed(r, {"prefopt", "trl", "trl_compact_head"}, {"trl", "trl_compact_head"})
        assert abs(r["loss"]["prefopt"] - 0.6931) > 1e-3  # policy and reference must differ
        for difference in r["relative_difference"].values():
            assert difference["loss"] < 1e-5
            assert difference["gradient"] < 1e-4
    # both ways of having a reference are the same reference
    losses = [r["loss"]["prefopt"] for r in result["runs"]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_reward_model_steps_are_the_same_step(run: Any) -> None:
    (r,) = run("reward_model", "--no-memory")["runs"]
    assert_timed(r, {"prefopt", "trl"}, {"trl"})
    assert r["relative_difference"]["trl"]["loss"] < 1e-5
    assert r["relative_difference"]["trl"]["gradient"] < 1e-4


@pytest.mark.slow
def test_peak_memory_is_that_of_a_child(run: Any) -> None:
    memory = run("reward_model")["peak_memory_mib"]["step"]
    assert memory.keys() == {"prefopt", "trl"}
    assert all(100 < mib < 5000 for mib in memory.values())


def test_group_log_probs_agree(run: Any) -> None:
    result = run("group")
    assert [r["mode"] for r in result["runs"]] == ["no gradient", "with gradient"]
    for r in result["runs"]:
        assert_timed(r, {"tree", "rows", "transformers"}, {"rows", "transformers"})
        assert all(difference < 1e-4 for difference in r["relative_difference"].values())


@pytest.mark.slow
def test_the_estimate_of_memory_is_near_what_steps_take(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("memory")
    (found,) = module.main(["--size", "tiny", "--json", "--output", str(tmp_path)])["runs"]
    assert found["estimate_mib"] == pytest.approx(found["in_use_mib"], rel=0.15)
    written = json.loads((tmp_path / "memory-cpu.json").read_text())["runs"]
    assert written == [found]
