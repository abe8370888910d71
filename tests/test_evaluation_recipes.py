"""Recipes with a section ``eval``: what they train, what they refuse, what ``check`` says."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_chat_api import serving
from safetensors.torch import load_file

from prefopt.check import check
from prefopt.errors import PrefoptError
from prefopt.evaluation_recipe import read_evaluation, read_evaluation_data, trains_with
from prefopt.models.load import load_reward_model
from prefopt.recipe import EvalSection, load_recipe
from prefopt.reward_models import load_judge
from prefopt.train import read_recipe, train
from prefopt.world import WorldPaths, build_world
from prefopt.world.tokenizer import world_tokenizer

pytestmark = pytest.mark.usefixtures("frozen_heap")

PAIRS = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=24, preference_rows=PAIRS, prompt_rows=10)


@pytest.fixture(scope="module")
def judges(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained judges; a preference model is a plain causal LM."""
    folder = tmp_path_factory.mktemp("judges")
    for name in ("reward_model", "another"):
        model = load_reward_model(str(world.base), world_tokenizer(), new_head=True)
        model.score.weight.data.mul_(50)
        model.save_pretrained(folder / name)
        world_tokenizer().save_pretrained(folder / name)
    return {
        "reward_model": folder / "reward_model",
        "another": folder / "another",
        "preference_model": world.base,
    }


@pytest.fixture
def recipe(world: WorldPaths, judges: dict[str, Path], tmp_path: Path) -> Path:
    """DPO for two epochs of three steps, evaluated after each."""
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {"path": str(world.base)},
        "data": {"path": str(world.preferences)},
        "run_dir": str(tmp_path / "run"),
        "rollout": {"max_new_tokens": 6},
        "trainer": {
            "algorithm": "dpo",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            "logging_steps": 2,
        },
        "eval": {
            "prompts": str(world.prompts),
            "judge": {"kind": "reward_model", "path": str(judges["reward_model"])},
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def run(recipe: Path, *overrides: str) -> dict[str, Any]:
    return train(read_recipe(recipe, overrides))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_evaluated_after_every_epoch(
    recipe: Path, judges: dict[str, Path], tmp_path: Path
) -> None:
    summary = run(recipe)
    results = summary["evaluations"]
    assert [(each["after"], each["unit"], each["step"]) for each in results] == [
        (1, "epoch", 3), (2, "epoch", 6),
    ]  # fmt: skip
    assert "stopped" not in summary
    folder = tmp_path / "run" / "evaluations"
    assert json.loads((folder / "0002" / "result.json").read_text()) == results[1]
    judge = results[1]["judge"]
    assert judge["kind"] == "reward_model"
    assert judge["path"] == str(judges["reward_model"])
    assert len(judge["weights"]) == 32
    ours, theirs = (lines(folder / name) for name in ("0002/answers.jsonl", "baseline.jsonl"))
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
    asked = (
        [row["prompt"] for row in ours],
        *([row["completion"] for row in side] for side in (ours, theirs)),
    )
    expected = load_judge("reward_model", judge["path"]).prefer(*asked)
    found = [row["preference"] for row in lines(folder / "0002" / "preferences.jsonl")]
    assert found == pytest.approx(expected, abs=1e-6)
    assert results[1]["win_rate"] == pytest.approx(100 * np.mean(expected))
    logged = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "loss" not in row]
    assert [row["step"] for row in logged if "evaluation/win_rate" in row] == [3, 6]


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize("lora", ["null", "{r: 4, dropout: 0.1}"])
def test_a_run_ends_with_the_same_model_and_log(
    algorithm: str, lora: str, recipe: Path, world: WorldPaths, tmp_path: Path
) -> None:
    data = world.sft if algorithm == "sft" else world.preferences
    common = [
        f"trainer.algorithm={algorithm}", f"data.path={data}", f"model.lora={lora}",
        "trainer.gradient_checkpointing=true", "trainer.logging_steps=3",
    ]  # fmt: skip
    run(recipe, *common, "eval=null", f"run_dir={tmp_path}/plain")
    run(recipe, *common, f"run_dir={tmp_path}/evaluated")
    names = ("plain", "evaluated")
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in names)
    assert all(torch.equal(a[name], b[name]) for name in a)
    logs = [
        [
            {k: v for k, v in row.items() if "per_second" not in k and "time" not in k}
            for row in lines(tmp_path / name / "metrics.jsonl")
            if "evaluation/win_rate" not in row
        ]
        for name in names
    ]
    assert logs[0] == logs[1]


def test_the_judge_that_training_asks_judges_unless_another_is_named(
    recipe: Path, judges: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = [
        "trainer.algorithm=online_dpo", "trainer.rounds=2", "trainer.num_train_epochs=1",
        f"judge={{kind: reward_model, path: {judges['another']}}}",
    ]  # fmt: skip
    caplog.set_level(logging.INFO, logger="prefopt")
    own = run(recipe, *online, f"run_dir={tmp_path}/own")["evaluations"]
    assert "optimistic" not in caplog.text
    shared = run(recipe, *online, "eval.judge=null", f"run_dir={tmp_path}/shared")["evaluations"]
    assert "optimistic" in caplog.text
    assert {each["unit"] for each in own + shared} == {"round"}
    assert [each["judge"]["path"] for each in (own[0], shared[0])] == [
        str(judges["reward_model"]), str(judges["another"]),
    ]  # fmt: skip
    assert own[0]["win_rate"] != shared[0]["win_rate"]
    rounds = lines(tmp_path / "own" / "evaluations" / "0001" / "answers.jsonl")
    assert rounds == lines(tmp_path / "shared" / "evaluations" / "0001" / "answers.jsonl")


def test_the_judge_of_training_is_asked_too_where_it_is_another(
    recipe: Path, judges: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = [
        "trainer.algorithm=online_dpo", "trainer.rounds=1", "trainer.num_train_epochs=1",
        f"judge={{kind: reward_model, path: {judges['another']}}}",
    ]  # fmt: skip
    caplog.set_level(logging.INFO, logger="prefopt")
    not_watched = "over-optimisation is not watched"
    (result,) = run(recipe, *online)["evaluations"]
    assert not_watched not in caplog.text
    folder = tmp_path / "run" / "evaluations"
    ours, theirs = (lines(folder / name) for name in ("0001/answers.jsonl", "baseline.jsonl"))
    expected = load_judge("reward_model", str(judges["another"])).prefer(
        [row["prompt"] for row in ours],
        *([row["completion"] for row in side] for side in (ours, theirs)),
    )
    rows = lines(folder / "0001" / "preferences.jsonl")
    assert [row["training_preference"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert result["training_win_rate"] == pytest.approx(100 * np.mean(expected))
    run(recipe, *online, "guards.over_optimisation=false", f"run_dir={tmp_path}/off")
    first = lines(tmp_path / "off" / "evaluations" / "0001" / "preferences.jsonl")[0]
    assert first.keys() == {"prompt", "preference"}
    assert not_watched not in caplog.text
    read_evaluation(read_recipe(recipe, [*online, "eval=null"]))
    assert f"{not_watched}: the recipe has no section eval" in caplog.text
    caplog.clear()
    read_evaluation(read_recipe(recipe, [*online, "eval.judge=null"]))
    assert f"{not_watched}: eval.judge is the judge that training asks" in caplog.text
    caplog.clear()
    read_evaluation(read_recipe(recipe, ["eval=null"]))  # DPO asks no judge that could be gamed
    assert not_watched not in caplog.text


def test_a_preference_model_judges_too(recipe: Path, judges: dict[str, Path]) -> None:
    judge = f"eval.judge={{kind: preference_model, path: {judges['preference_model']}}}"
    results = run(recipe, judge, "trainer.max_steps=1")["evaluations"]
    assert [each["judge"]["kind"] for each in results] == ["preference_model"]


def test_an_api_is_asked_about_each_pair_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "a-secret-that-no-file-may-hold")
    with serving() as server:
        judge = f"{{kind: api, model: big, base_url: '{server.url}', key_variable: TEST_KEY}}"
        summary = run(recipe, f"eval.judge={judge}")
        asked = len(server.times)
        assert run(recipe, f"eval.judge={judge}", "run_dir=" + str(tmp_path / "run")) == summary
        assert len(server.times) == asked
    record = summary["evaluations"][0]["judge"]
    assert {name: record[name] for name in ("kind", "model", "base_url")} == {
        "kind": "api", "model": "big", "base_url": server.url,
    }  # fmt: skip
    folder = tmp_path / "run" / "evaluations"
    start = lines(folder / "baseline.jsonl")
    games = set()
    for name in ("0001", "0002"):
        for ours, theirs in zip(lines(folder / name / "answers.jsonl"), start, strict=True):
            if ours["completion"] != theirs["completion"]:
                games.add((str(ours["prompt"]), ours["completion"], theirs["completion"]))
    assert asked == 2 * len(games) > 0
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"a-secret-that" not in path.read_bytes()


# --- a baseline in a file ------------------------------------------------------------------------


def test_a_file_of_answers_is_the_baseline(recipe: Path, world: WorldPaths, tmp_path: Path) -> None:
    prompts = [row["prompt"] for row in lines(world.prompts)]
    rows = [{"prompt": p, "completion": f"answer {k}"} for k, p in enumerate(prompts)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    summary = run(recipe, f"eval.baseline={path}", "eval.every=2", "eval.max_prompts=4")
    assert [each["after"] for each in summary["evaluations"]] == [0, 2]
    assert {each["baseline"] for each in summary["evaluations"]} == {str(path)}
    kept = lines(tmp_path / "run" / "evaluations" / "baseline.jsonl")
    assert [row["completion"] for row in kept] == [f"answer {k}" for k in range(4)]
    path.write_text(json.dumps({"prompt": prompts[0], "completion": "a"}) + "\n")
    with pytest.raises(PrefoptError) as error:
        run(recipe, f"eval.baseline={path}", f"run_dir={tmp_path}/other")
    assert str(error.value).startswith(
        f"eval.baseline: {path} has no answer to 9 of the 10 prompts in {world.prompts}, such as "
    )
    assert not (tmp_path / "other").exists()


def test_a_baseline_whose_prompts_have_another_form_is_told(tmp_path: Path) -> None:
    turn = [{"role": "user", "content": "Name a fruit."}]
    files = {"plain": "Name a fruit.", "chat": turn}
    for name, prompt in files.items():
        (tmp_path / name).with_suffix(".jsonl").write_text(
            json.dumps({"prompt": prompt, "completion": "An apple."}) + "\n"
        )
    for asked, answered, form in (("plain", "chat", "plain text"), ("chat", "plain", "a conv")):
        prompts, baseline = (str(tmp_path / f"{name}.jsonl") for name in (asked, answered))
        with pytest.raises(PrefoptError, match=f"only the prompt in .*{asked}.jsonl is {form}"):
            read_evaluation_data(EvalSection(prompts=prompts, baseline=baseline))


def test_a_judge_is_the_same_by_another_path(
    recipe: Path, judges: dict[str, Path], tmp_path: Path
) -> None:
    path = judges["another"]
    for own, same in ((path, True), (path / ".." / path.name, True), (path.parent, False)):
        options = ["trainer.algorithm=online_dpo", f"judge={{kind: reward_model, path: {path}}}"]
        read = read_recipe(recipe, [*options, f"eval.judge={{kind: reward_model, path: {own}}}"])
        assert trains_with(read) is same


# --- what is refused, and what is said -----------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval.judge=null"], "eval: found no judge; expected a section eval.judge"),
        (["eval.prompts=nowhere.jsonl"], "eval.prompts: .*nowhere.jsonl"),
        (["eval.baseline=nowhere.jsonl"], "eval.baseline: .*nowhere.jsonl"),
        (["eval.judge.path=nowhere"], r"eval\.judge\.path: .*nowhere"),
        (["eval.max_new_tokens=9999"], "eval.prompts: prompt 0 has .* tokens: with max_new_tokens"),
        (["eval.judge={kind: api, model: m}"], "eval.judge: .*OPENAI_API_KEY is not set"),
        (
            ["eval.stop_on_drop=5", "trainer.load_best_model_at_end=true",
             "trainer.eval_strategy=epoch", "trainer.save_strategy=epoch",
             "data.eval_fraction=0.2"],
            "eval.stop_on_drop: found with trainer.load_best_model_at_end",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_training(
    overrides: list[str], words: str, recipe: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(PrefoptError, match=words):
        run(recipe, *overrides)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ("{kind: api, path: x}", "'eval.judge': kind api needs 'model', and takes no 'path'"),
        ("{kind: reward_model}", "kind reward_model needs 'path', and takes no 'model'"),
        ("{kind: reward_model, path: x, model: y}", "takes no 'model'"),
        ("{kind: rule}", "'eval.judge.kind': expected"),
    ],
)
def test_a_judge_says_where_it_is(judge: str, words: str, recipe: Path) -> None:
    with pytest.raises(PrefoptError, match=words):
        load_recipe(recipe, [f"eval.judge={judge}"])


def test_a_section_that_changed_is_refused_once_the_run_has_begun(
    recipe: Path, tmp_path: Path
) -> None:
    judge = load_recipe(recipe).eval.judge.path  # type: ignore[union-attr]
    run(recipe)
    for key, value in (("eval.every", "2"), ("eval.stop_on_drop", "3")):
        with pytest.raises(PrefoptError, match=f"other values of {key}"):
            run(recipe, f"{key}={value}")
    moved = f"eval.judge={{kind: reward_model, path: {judge}, concurrency: 2, key_variable: KEY}}"
    assert run(recipe, moved)["steps"] == 6


def test_a_judge_that_is_trained_is_not_evaluated(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prefopt")
    summary = run(recipe, "trainer.algorithm=reward_model", "trainer.max_steps=1")
    assert "evaluations" not in summary
    assert "eval is not used by reward_model" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"every": 1, "unit": "epoch", "evaluations": 2, "answers": 30, "comparisons": 20}),
        (["eval.every=2", "eval.max_prompts=4"], {"evaluations": 1, "answers": 8}),
        (["trainer.max_steps=4"], {"evaluations": 2}),
        (["trainer.algorithm=online_dpo", "trainer.rounds=3"],
         {"every": 1, "unit": "round", "evaluations": 3, "answers": 40}),
        (["trainer.algorithm=hypo", "trainer.per_device_train_batch_size=1"],
         {"every": 3, "evaluations": 8}),
    ],
)  # fmt: skip
def test_check_says_how_much_there_is_to_answer(
    overrides: list[str], expected: dict[str, Any], recipe: Path, judges: dict[str, Path]
) -> None:
    judge = f"judge={{kind: reward_model, path: {judges['another']}}}"
    report = check(recipe, [judge, *overrides])
    found = report["win_rate"]
    assert {name: found[name] for name in expected} == expected
    assert report["errors"] == 0
    assert report["memory"]["parts"]["judge of evaluations"] > 0


def test_check_says_what_is_wrong_with_the_judge(recipe: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("KEY", raising=False)
    api = check(recipe, ["eval.judge={kind: api, model: m, key_variable: KEY}"])
    [error] = [f for f in api["findings"] if f["severity"] == "error"]
    assert "KEY is not set" in error["found"]
    assert "judge of evaluations" not in api["memory"]["parts"]
    later = check(recipe, ["eval.judge.path=runs/later"])
    [error] = [f for f in later["findings"] if f["severity"] == "error"]
    assert (error["kind"], "runs/later" in error["found"]) == ("judge", True)
    assert any("runs/later" in note for note in later["memory"]["notes"])


def test_prompts_that_recur_are_asked_once(recipe: Path, world: WorldPaths, tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text(world.prompts.read_text() * 2)
    assert check(recipe, [f"eval.prompts={path}"])["win_rate"]["prompts"] == 10


# over 20 s: two interpreters import torch and transformers
@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(recipe: Path, tmp_path: Path) -> None:
    options = ["trainer.train_sampling_strategy=sequential", "trainer.learning_rate=0.001"]
    two = [*options, "trainer.per_device_train_batch_size=4", f"run_dir={tmp_path}/two"]
    command = [sys.executable, "-m", "prefopt", "train", str(recipe), *two, "--num-processes", "2"]
    # gloo now and then aborts an interpreter that has done its work, so the status says nothing
    subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    one = run(recipe, *options, f"run_dir={tmp_path}/one")
    assert len(summary["evaluations"]) == len(one["evaluations"]) == 2
    for name in ("baseline.jsonl", "0001/answers.jsonl", "0002/answers.jsonl"):
        assert lines(tmp_path / "one" / "evaluations" / name) == lines(
            tmp_path / "two" / "evaluations" / name
        )
    for ours, theirs in zip(summary["evaluations"], one["evaluations"], strict=True):
        assert ours["win_rate"] == pytest.approx(theirs["win_rate"], abs=1e-3)
        assert ours["judge"] == theirs["judge"]
    steps = [row["step"] for row in lines(tmp_path / "two" / "metrics.jsonl")]
    assert steps == [row["step"] for row in lines(tmp_path / "one" / "metrics.jsonl")]
