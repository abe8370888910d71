"""The quickstart: every stage on a very small world, and learning on the real one."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from prefopt import quickstart as module
from prefopt.errors import PrefoptError
from prefopt.quickstart import (
    available_algorithms,
    exploitability,
    paired_difference,
    quickstart,
    remark,
    style_wins,
)
from prefopt.world import STYLES, build_world, ideal_answer

ALGORITHMS = ("dpo", "online_dpo", "hypo", "inpo", "nash_mp", "drpo")


# over 20 s: two processes import torch, and thirteen models are trained and sampled
def test_every_stage_leaves_what_the_summary_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(build_world, sft_rows=200, preference_rows=60, prompt_rows=16)
    monkeypatch.setattr(module, "build_world", small)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for recipe in module.RECIPES.iterdir():
        text = re.sub(r"(prompts_per_round|batch_size): \d+", r"\1: 16", recipe.read_text())
        text = re.sub(r"rounds: 24", "rounds: 2", text)
        (recipes / recipe.name).write_text(text)
    monkeypatch.setattr(module, "RECIPES", recipes)
    out, names = tmp_path / "run", ["dpo", "hypo", "nash_mp", "drpo"]
    summary = quickstart(out, seed=1, algorithms=names)
    assert summary == json.loads((out / "summary.json").read_text())
    for result in (summary, summary["intransitive"]):
        assert list(result["algorithms"]) == ["sft", *names]
        for name in names:
            row = result["algorithms"][name]
            low, high = row["win_rate_ci"]
            assert 0 <= low <= row["win_rate"] <= high <= 100
            assert {"kl", "mean_length", "seconds"} <= row.keys()
        assert result["algorithms"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)
        assert result["reward_model"]["pairs"] == 6
        assert 0 <= result["preference_model"]["position_consistency"] <= 1
    circular = summary["intransitive"]["algorithms"]
    assert all(-0.5 <= row["exploitability"] <= 0.5 for row in circular.values())
    assert (out / "intransitive" / "report.html").exists()
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert set(samples[0]["answers"]) == {"sft", *names}
    page = (out / "report.html").read_text()
    assert samples[0]["prompt"].split(": ")[1].split()[0] in page
    assert "exploitability" in page, "the intransitive setting stands on the same page"
    assert summary["intransitive"]["remark"].count("(") == 3, "all but dpo are compared with it"
    assert "Exploitability minus that of dpo" in page
    assert quickstart(out, seed=1, algorithms=names) == summary, "a second call only reads"
    with pytest.raises(PrefoptError, match="expected a world made with"):
        quickstart(out, seed=2, algorithms=names)


def test_exploitability_is_what_the_best_style_gains() -> None:
    prompts = [[{"role": "user", "content": "please say again : cow dog"}]] * 3
    chatty = [ideal_answer(prompts[0], "chatty")] * 3
    # plain beats chatty by the style margin: sigmoid(0.3 / 0.1)
    assert exploitability(style_wins(prompts, chatty))["exploitability"] == pytest.approx(
        0.952574 - 0.5
    )
    balanced = [ideal_answer(prompts[0], style) for style in STYLES]
    assert exploitability(style_wins(prompts, balanced))["exploitability"] == pytest.approx(0.0)
    rude = ["obviously : cow dog ."] * 3
    assert exploitability(style_wins(prompts, rude))["exploitability"] > 0.4


def test_a_difference_in_exploitability_comes_with_its_chance() -> None:
    noise = np.random.default_rng(0).uniform(0, 0.4, size=(3, 400))
    better, worse = noise + 0.1, noise[:, ::-1] + 0.2
    difference, low, high = paired_difference(better, worse, seed=0)
    assert low < difference < high < 0
    assert difference == pytest.approx(-0.1)
    assert paired_difference(worse, worse, seed=0) == [0, 0, 0]
    rows = {
        "sft": {},
        "dpo": {},
        "inpo": {"exploitability over dpo": [difference, low, high]},
        "drpo": {"exploitability over dpo": [0.1, -0.1, 0.2]},
    }
    text = remark(rows)
    assert f"inpo -0.100 ({low:+.3f} to {high:+.3f}, lower)" in text
    assert "drpo +0.100 (-0.100 to +0.200, not told apart)" in text
    assert remark({"sft": {}, "inpo": {}}) == ""


def test_an_unknown_algorithm_is_named_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(PrefoptError, match=r"'ppp' has no quickstart; there are .*dpo"):
        quickstart(tmp_path / "run", algorithms=["ppp"])
    assert not (tmp_path / "run").exists()


def test_the_trainers_of_the_table_have_a_quickstart() -> None:
    assert available_algorithms() == list(ALGORITHMS)


# both real worlds from nothing, 6 to 8 minutes on 2 cores: the regression test of learning
@pytest.mark.slow
def test_every_algorithm_beats_sft_by_the_gold_rule(tmp_path: Path) -> None:
    summary = quickstart(tmp_path, seed=0)
    sft = summary["algorithms"]["sft"]
    for name in ALGORITHMS:
        row = summary["algorithms"][name]
        assert row["win_rate_ci"][0] > 50, name
        assert row["gold_quality"] > sft["gold_quality"], name
    circle = summary["intransitive"]
    assert circle["preference_model"]["accuracy"] > circle["reward_model"]["accuracy"] + 0.1, (
        "one score an answer cannot say who wins in a circle"
    )
    exploitable = {k: v["exploitability"] for k, v in circle["algorithms"].items()}
    assert max(exploitable["inpo"], exploitable["nash_mp"]) < exploitable["sft"]
    assert summary["reward_model"]["accuracy"] > 0.6
    assert summary["preference_model"]["accuracy"] > 0.6
