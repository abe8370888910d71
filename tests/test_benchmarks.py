"""The benchmarks run, write what they promise, and compare like with like."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
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


def test_judges_say_the_same(run: Any) -> None:
    result = run("judges")
    modes = ["tournament", "all pairs", "one pair", "scores"]
    assert [r["mode"] for r in result["runs"]] == modes
    for r in result["runs"]:
        peers = {"transformers"} if r["mode"] == "scores" else {"alone", "transformers"}
        assert_timed(r, {"tree"} | peers, peers)
        assert r["difference"].keys() == peers
        assert all(difference < 1e-5 for difference in r["difference"].values())


ITERATION = ["--prompts", "8", "--pairs", "4", "--micro-batch", "2", "--no-memory"]


def test_both_sides_of_online_dpo_do_the_same_work(run: Any) -> None:
    result = run("online_dpo", *ITERATION)
    assert [r["mode"] for r in result["runs"]] == ["rounds", "on-policy", "large batch"]
    assert [r["arguments"]["per_device_train_batch_size"] for r in result["runs"]] == [2, 4, 4]
    for r in result["runs"]:
        assert_timed(r, {"prefopt", "trl"}, {"trl"})
        for name in ("prefopt", "trl"):
            assert r["completions"][name] == [16, 16]
            assert r["optimiser_steps"][name] == [2, 2]
            assert all(16 < tokens <= 16 * 16 for tokens in r["tokens"][name])
            times = r["phases"][name]
            assert times.keys() == {"generate", "judge", "reference", "optimise", "rest"}
            assert all(clock > 0 for phase in times.values() for clock in phase.values())
            total = sum(phase["wall"] for phase in times.values())
            assert total == pytest.approx(r["seconds"][name]["wall"]["median"], rel=0.3)


def test_samples_of_the_benchmark_end_by_themselves(run: Any) -> None:
    """Half of a geometric distribution is below ln 2 of its mean, which is 8 of at most 16."""
    (r,) = run("online_dpo", *ITERATION, "--prompts", "48", "--modes", "large batch")["runs"]
    for tokens in r["tokens"].values():
        assert all(4 < count / 96 < 10 for count in tokens)


def test_the_gpu_benchmark_runs_without_a_gpu_and_without_trl(tmp_path: Path) -> None:
    program = (
        "import sys, runpy; sys.modules.update(trl=None, vllm=None); "
        "sys.path.insert(0, sys.argv[1]); sys.argv = ['gpu.py', *sys.argv[2:]]; "
        "runpy.run_path(sys.path[0] + '/gpu.py', run_name='__main__')"
    )
    options = ["--device", "cpu", "--tiny", "--json", "--output", str(tmp_path)]
    child = subprocess.run(
        [sys.executable, "-c", program, str(FOLDER), *options], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result == json.loads(child.stdout)
    assert result["matmul"]["tflops"] > 0
    assert result["dpo tiny, trl"] == {"skipped": "trl is not installed"}
    ways = [result[f"dpo tiny, {way}"] for way in ("trees", "rows, flash", "rows, mask")]
    for way in ways:
        assert way["loss"] == pytest.approx(ways[0]["loss"], abs=1e-5), "all take the same step"
        assert way["tokens_a_second"] > 0
        assert 0 < way["mfu"] < 1
    assert result["attention tiny"]["seconds"].keys() == {"trees, variable length", "rows, flash"}


def test_out_of_time_the_gpu_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu = importlib.import_module("gpu")
    options = ["--device", "cpu", "--tiny", "--budget", "0", "--output", str(tmp_path)]
    result = gpu.main(options)
    assert result["attention tiny"] == {"skipped": "out of time"}


def test_flops_of_a_step_are_those_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: one prompt of 2, completions of 1 and 3 tokens, a model of 1 layer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu = importlib.import_module("gpu")
    monkeypatch.setitem(gpu.SHAPES, "one", (4, 8, 1, 2, 1, 10))
    trees = [gpu.PromptTree([5, 6], [[7], [7, 8, 9]])]
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8  # queries, keys and values, output, MLP
    head = 8 * 4 * 10 * 4
    seen_on_tree = 3 + (2 + 1) + (3 * 2 + 6)
    assert gpu.step_flops("one", trees, "trees") == 6 * (weights * 6 + 2 * 4 * seen_on_tree) + head
    seen_in_rows = 2 * 15  # padded to 5
    rows = gpu.step_flops("one", trees, "rows, mask")
    assert rows == 6 * (weights * 10 + 2 * 4 * seen_in_rows) + head


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


def test_the_leaderboard_agrees_with_liblinear(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    size = ["--models", "3", "--instructions", "40", "--peer-models", "2", "--samples", "10"]
    module = importlib.import_module("leaderboard")
    result = module.main([*size, "--json", "--output", str(tmp_path)])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "leaderboard-cpu.json").read_text())
    assert result["largest_difference"] < 0.1
    assert all(clock > 0 for times in result["seconds"].values() for clock in times.values())
