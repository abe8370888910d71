"""The quickstart: every stage on a very small world, and learning on the real one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from prefopt import quickstart as module
from prefopt.errors import PrefoptError
from prefopt.quickstart import available_algorithms, quickstart
from prefopt.world import build_world


def test_every_stage_leaves_what_the_summary_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(build_world, sft_rows=200, preference_rows=60, prompt_rows=16)
    monkeypatch.setattr(module, "build_world", small)
    summary = quickstart(tmp_path, seed=1, algorithms=["dpo"])
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["algorithms"]) == ["sft", "dpo"]
    dpo = summary["algorithms"]["dpo"]
    low, high = dpo["win_rate_ci"]
    assert 0 <= low <= dpo["win_rate"] <= high <= 100
    assert {"kl", "mean_length", "seconds"} <= dpo.keys()
    assert summary["algorithms"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["reward_model"]["pairs"] == 6
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert set(samples[0]["answers"]) == {"sft", "dpo"}
    page = (tmp_path / "report.html").read_text()
    assert samples[0]["prompt"].split(": ")[1].split()[0] in page
    assert quickstart(tmp_path, seed=1, algorithms=["dpo"]) == summary, "a second call only reads"
    with pytest.raises(PrefoptError, match="expected a world made with"):
        quickstart(tmp_path, seed=2, algorithms=["dpo"])


def test_an_unknown_algorithm_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match=r"'ppp' has no quickstart; there are .*dpo"):
        quickstart(tmp_path / "run", algorithms=["ppp"])
    assert not (tmp_path / "run").exists()


def test_the_trainers_of_the_table_have_a_quickstart() -> None:
    assert "dpo" in available_algorithms()


# the real world from nothing, about 3 minutes on 2 cores: the regression test of learning
@pytest.mark.slow
def test_dpo_beats_sft_by_the_gold_rule(tmp_path: Path) -> None:
    summary = quickstart(tmp_path, seed=0, algorithms=["dpo"])
    dpo, sft = summary["algorithms"]["dpo"], summary["algorithms"]["sft"]
    assert dpo["win_rate_ci"][0] > 50
    assert dpo["gold_quality"] > sft["gold_quality"]
    assert summary["reward_model"]["accuracy"] > 0.65
