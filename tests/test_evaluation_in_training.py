"""Evaluation while training: it changes nothing, survives kills, and ends a run that got worse."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from run_folders import contents
from test_players import OVERLAP, Apart
from test_rounds import (
    EVERY_RUN,
    PROMPTS,
    SEED,
    TOKENIZER,
    Graded,
    Stopped,
    brief_policy,
    equal,
    fine,
    make_trainer,
    pair_of,
    tiny_policy,
    weights,
)
from test_rounds_killed import StopBefore

from prefopt.data.rows import Prompt
from prefopt.data.tokenize import tokenize_prompts
from prefopt.errors import PrefoptError
from prefopt.evaluation import Evaluation, EvaluationTask
from prefopt.judge import Judge
from prefopt.rollout.engine import SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.sums import write_summed
from prefopt.run_folder import MetricsFile
from prefopt.trainers.base import CompleteCheckpoints
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer

pytestmark = pytest.mark.usefixtures("frozen_heap")

ASKED = PROMPTS[12:20]
GREEDY = SamplingSettings(max_new_tokens=6, temperature=0.0)
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")


class Noisy(Graded):
    """Draws from every random generator of the process, as loading a model may."""

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        torch.rand(3), np.random.rand(3), random.random()
        return super().prefer(prompts, a, b)


class Said(Graded):
    """Says one thing in each evaluation: P(a beats b) of all pairs, or of each."""

    def __init__(self, *rates: float | Sequence[float]) -> None:
        super().__init__(fine)
        self.rates = list(rates)

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        return np.broadcast_to(np.array(self.rates.pop(0)), len(prompts)).copy()


def task_of(judge: Judge | None = None, **options: Any) -> EvaluationTask:
    judge = judge or Noisy(fine)
    settings = {"prompts": ASKED, "every": 1, "sampling": GREEDY, **options}
    return EvaluationTask(judge=lambda trainer: (judge, {"kind": "rule"}), **settings)


def dpo(
    folder: Path, *, callbacks: Sequence[Any] = (), peft_config: Any = None, **options: Any
) -> CompleteCheckpoints:
    """DPO on 12 pairs: three steps an epoch, two epochs."""
    args = DPOConfig(output_dir=str(folder), seed=SEED, **EVERY_RUN | options)
    return DPOTrainer(
        tiny_policy(),
        args,
        train_dataset=[pair_of(prompt) for prompt in PROMPTS[:12]],
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


def online(folder: Path, **options: Any) -> CompleteCheckpoints:
    return make_trainer(folder, **options)


def nash_mp(folder: Path, **options: Any) -> CompleteCheckpoints:
    """Four steps, two a round."""
    small = {"algorithm": "nash_mp", "steps_per_round": 2, "num_train_epochs": 1}
    return make_trainer(folder, model=brief_policy(), **small, **options)


MADE: dict[str, Callable[..., CompleteCheckpoints]] = {
    "dpo": dpo,
    "online_dpo": online,
    "nash_mp": nash_mp,
}


def evaluated(
    trainer: CompleteCheckpoints, folder: Path, task: EvaluationTask | None = None
) -> Evaluation:
    return Evaluation(trainer, task or task_of(), folder / "evaluations", "hash")


def untimed(trainer: CompleteCheckpoints, evaluations: bool = True) -> list[dict[str, Any]]:
    """The log without what tells the time."""
    timed = ("time/", "tokens_per_second", "train_")
    lines = [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in trainer.state.log_history
        if "train_runtime" not in line
    ]
    return [line for line in lines if evaluations or "evaluation/win_rate" not in line]


def rates(trainer: CompleteCheckpoints) -> list[tuple[int, float]]:
    name = "evaluation/win_rate"
    return [(line["step"], line[name]) for line in trainer.state.log_history if name in line]


# --- what is made --------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("name", MADE)
def test_training_is_bit_for_bit_the_same(name: str, adapter: Any, tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "peft_config": adapter, "disable_dropout": True}
    plain = MADE[name](tmp_path / "plain", **options)
    plain.train()
    looked_at = MADE[name](tmp_path / "evaluated", **options)
    evaluation = evaluated(looked_at, tmp_path)
    looked_at.train()
    after = torch.get_rng_state()
    assert len(evaluation.finish()) == 2
    assert torch.equal(torch.get_rng_state(), after)
    assert equal(weights(plain.model), weights(looked_at.model))
    assert untimed(plain) == untimed(looked_at, evaluations=False)
    for one, other in zip(plain.model.modules(), looked_at.model.modules(), strict=True):
        assert one.training == other.training


@pytest.mark.parametrize("name", MADE)
def test_the_answers_are_those_of_the_policy_at_that_step(name: str, tmp_path: Path) -> None:
    steps = {"dpo": 3, "online_dpo": 3, "nash_mp": 2}[name]
    trainer = MADE[name](tmp_path, save_strategy="steps", save_steps=steps, save_total_limit=None)
    start = TransformersEngine(type(trainer.model)(trainer.model.config), TOKENIZER)
    start.model.load_state_dict(trainer.model.state_dict())
    start.stop_token_ids = TransformersEngine(trainer.model, TOKENIZER).stop_token_ids
    evaluation = evaluated(trainer, tmp_path)
    trainer.train()
    results = evaluation.finish()
    assert [result["step"] for result in results] == [steps, 2 * steps]
    ids = list(tokenize_prompts(ASKED, TOKENIZER, max_prompt_length=None).prompt_ids)
    folders = ["baseline.jsonl", "0001/answers.jsonl", "0002/answers.jsonl"]
    said = []
    for folder, step in zip(folders, (0, steps, 2 * steps), strict=True):
        if step:
            saved = tmp_path / f"checkpoint-{step}"
            start.model.load_state_dict(type(start.model).from_pretrained(saved).state_dict())
        rows = [json.loads(line) for line in (tmp_path / "evaluations" / folder).open()]
        expected = [group[0] for group in start.generate(ids, GREEDY)]
        assert [row["completion"] for row in rows] == [answer.text for answer in expected]
        assert [row["finish_reason"] for row in rows] == [a.finish_reason for a in expected]
        assert [row["prompt"] for row in rows] == ASKED
        assert {row["sample"] for row in rows} == {0}
        said.append([row["completion"] for row in rows])
    assert said[0] != said[1] != said[2]


def test_a_result_says_all_that_was_promised(tmp_path: Path) -> None:
    trainer = online(tmp_path)
    evaluation = evaluated(trainer, tmp_path)
    trainer.train()
    results = evaluation.finish()
    folder = tmp_path / "evaluations"
    assert sorted(path.name for path in folder.glob("[!.]*")) == [
        "0001", "0002", "baseline.jsonl", "start.json",
    ]  # fmt: skip
    last = json.loads((folder / "0002" / "result.json").read_text())
    assert last == results[1]
    rows = [json.loads(line) for line in (folder / "0002" / "preferences.jsonl").open()]
    assert [row["prompt"] for row in rows] == list(range(8))
    assert last["win_rate"] == pytest.approx(100 * np.mean([row["preference"] for row in rows]))
    answers = [json.loads(line) for line in (folder / "0002" / "answers.jsonl").open()]
    assert last["mean_length"] == np.mean([len(row["completion"]) for row in answers])
    assert {k: last[k] for k in ("after", "unit", "step", "judge", "baseline", "prompts")} == {
        "after": 2, "unit": "round", "step": 6, "judge": {"kind": "rule"}, "baseline": "start",
        "prompts": 8,
    }  # fmt: skip
    assert last.keys() >= {
        "win_rate_ci", "standard_error", "wins", "ties", "losses", "baseline_mean_length",
        "length_controlled",
    }  # fmt: skip
    line = next(x for x in reversed(trainer.state.log_history) if "evaluation/win_rate" in x)
    assert line["evaluation/win_rate"] == last["win_rate"]
    assert [line["evaluation/win_rate_low"], line["evaluation/win_rate_high"]] == last[
        "win_rate_ci"
    ]
    assert line["evaluation/length"] == last["mean_length"]
    assert line["evaluation/baseline_length"] == last["baseline_mean_length"]
    assert line["time/evaluation"] > 0


@pytest.mark.parametrize(
    ("options", "every", "expected"),
    [
        (
            {"rounds": 5},
            2,
            [(2, 2), (4, 5), (5, 7)],
        ),  # of 2, 2, 3, 2 and 3 prompts, in batches of 4
        ({"rounds": 2, "max_steps": 5}, 1, [(1, 3), (2, 5)]),  # the last round ends early
        ({"rounds": 2}, 9, [(2, 6)]),
    ],
)
def test_evaluations_come_every_so_many_rounds_and_at_the_end(
    options: dict[str, Any], every: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    trainer = online(tmp_path, **options)
    evaluation = evaluated(trainer, tmp_path, task_of(every=every))
    trainer.train()
    assert [(each["after"], each["step"]) for each in evaluation.finish()] == expected
    assert [step for step, _ in rates(trainer)] == [step for _, step in expected]


@pytest.mark.parametrize(
    ("options", "every", "expected"),
    [
        ({"num_train_epochs": 3}, 2, [(2, 6), (3, 9)]),
        ({"max_steps": 4}, 1, [(1, 3), (2, 4)]),
        ({"num_train_epochs": 1.5}, 1, [(1, 3), (2, 5)]),
    ],
)
def test_without_rounds_they_come_every_so_many_epochs(
    options: dict[str, Any], every: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    trainer = dpo(tmp_path, **options)
    evaluation = evaluated(trainer, tmp_path, task_of(every=every))
    trainer.train()
    results = evaluation.finish()
    assert [(each["after"], each["step"]) for each in results] == expected
    assert {each["unit"] for each in results} == {"epoch"}


def test_over_a_file_the_start_is_evaluated_too(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    task = task_of(baseline=[f"answer {k}" for k in range(8)], baseline_name="file.jsonl")
    evaluation = evaluated(trainer, tmp_path, task)
    trainer.train()
    results = evaluation.finish()
    assert [(each["after"], each["step"]) for each in results] == [(0, 0), (1, 3), (2, 6)]
    assert {each["baseline"] for each in results} == {"file.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "evaluations" / "baseline.jsonl").open()]
    assert [row["completion"] for row in rows] == task.baseline
    assert rows[0].keys() == {"prompt", "sample", "completion", "finish_reason", "tokens"}


def test_the_speed_of_training_is_told_without_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = online(tmp_path)
    evaluated(trainer, tmp_path)
    now = [0.0]
    monkeypatch.setattr("prefopt.trainers.base.time.perf_counter", lambda: now[0])

    def hour_long(done: int) -> bool:
        now[0] += 3600.0
        return False

    monkeypatch.setattr(trainer.evaluator, "after", hour_long)
    trainer._clock = 0.0
    assert not trainer.ends_after(1)
    assert trainer._clock == 3600.0


# --- engines with weights of their own -----------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_the_engine_of_the_rounds_answers_with_the_weights_of_that_step(
    overlap: bool, tmp_path: Path
) -> None:
    options = OVERLAP | {"overlap": overlap}
    plain = online(tmp_path / "plain", engine=Apart(elsewhere=True), **options)
    plain.train()
    live = online(tmp_path / "live", **options | {"overlap": False})
    expected = evaluated(live, tmp_path / "live")
    live.train()
    engine = Apart(elsewhere=True)
    trainer = online(tmp_path / "pushed", engine=engine, **options)
    evaluation = evaluated(trainer, tmp_path / "pushed")
    trainer.train()
    results = evaluation.finish()
    assert equal(weights(plain.model), weights(trainer.model))
    assert equal(engine.held[-1], weights(trainer.model))
    assert [each["step"] for each in results] == [2, 4, 6, 8]
    if not overlap:  # else the policies are others
        assert [x["win_rate"] for x in results] == [x["win_rate"] for x in expected.finish()]


# --- interrupted runs ----------------------------------------------------------------------------


class StopsAt(Noisy):
    """Ends the run in the middle of an evaluation."""

    def __init__(self, number: int) -> None:
        super().__init__(fine)
        self.left = number

    def prefer(self, *texts: Any) -> np.ndarray:
        self.left -= 1
        if self.left == 0:
            raise Stopped
        return super().prefer(*texts)


def run(
    name: str, folder: Path, judge: Judge | None = None, stop: int | None = None, **options: Any
) -> tuple[CompleteCheckpoints, list[dict[str, Any]]]:
    """A run with its metrics on disk, from wherever it was left."""
    metrics = MetricsFile(folder / "metrics.jsonl")
    folder.mkdir(exist_ok=True)
    callbacks = [metrics] if stop is None else [metrics, StopBefore(stop)]
    trainer = MADE[name](folder / "checkpoints", callbacks=callbacks, **options)
    evaluation = evaluated(trainer, folder, task_of(judge))
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer, evaluation.finish()


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


SAVED: dict[str, dict[str, Any]] = {
    "no": {},
    "each": {"save_strategy": "epoch"},
    "steps": {"save_strategy": "steps", "save_steps": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Uninterrupted runs of adapters, each made once: its folder, and what `run` returns."""
    runs: dict[str, tuple[Path, Any]] = {}

    def one(name: str) -> tuple[Path, Any]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name) / "whole"
            runs[name] = (folder, run(name, folder, peft_config=LORA, **SAVED["no"]))
        return runs[name]

    return one


@pytest.mark.parametrize(
    ("name", "saved", "judge", "step"),
    [
        ("dpo", "each", 1, None),  # in the first evaluation, whose answers are on disk
        ("dpo", "steps", 1, None),
        ("dpo", "each", None, 3),  # when the first is complete
        ("dpo", "steps", 2, None),  # in the last one
        ("online_dpo", "each", 1, None),
        ("online_dpo", "each", 2, None),
        ("online_dpo", "each", None, 3),
        ("online_dpo", "steps", None, 3),
        ("online_dpo", "steps", None, 0),  # before anything but the baseline
        ("nash_mp", "steps", 1, None),
        ("nash_mp", "steps", None, 2),
    ],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    name: str,
    saved: str,
    judge: int | None,
    step: int | None,
    whole: Callable[[str], tuple[Path, Any]],
    tmp_path: Path,
) -> None:
    options = {"peft_config": LORA, **SAVED[saved]}
    with pytest.raises(Stopped):
        run(name, tmp_path, None if judge is None else StopsAt(judge), step, **options)
    if judge is not None:
        assert (tmp_path / "evaluations" / f"000{judge}" / "answers.jsonl").exists()
        assert not (tmp_path / "evaluations" / f"000{judge}" / "result.json").exists()
    resumed, again = run(name, tmp_path, **options)
    folder, (uninterrupted, results) = whole(name)
    assert equal(weights(uninterrupted.model), weights(resumed.model))
    assert results == again
    assert contents(folder / "evaluations") == contents(tmp_path / "evaluations")
    assert metrics(folder) == metrics(tmp_path), "nothing is logged twice"
    assert untimed(uninterrupted) == untimed(resumed)


def test_what_is_complete_is_not_made_again(tmp_path: Path) -> None:
    options = {"save_strategy": "no"}
    with pytest.raises(Stopped):
        run("online_dpo", tmp_path, None, 5, **options)  # all is trained again from the start
    first = tmp_path / "evaluations" / "0001" / "result.json"
    marked = {**json.loads(first.read_text()), "marked": True}
    write_summed(first, json.dumps(marked))
    judge = StopsAt(9)
    _, results = run("online_dpo", tmp_path, judge, **options)
    assert results[0] == marked
    assert judge.left == 8, "one evaluation was judged"
    assert [line["step"] for line in metrics(tmp_path) if "evaluation/win_rate" in line] == [3, 6]


def test_judgements_on_disk_are_not_asked_for_again(tmp_path: Path) -> None:
    options = {"save_strategy": "no"}
    _, results = run("online_dpo", tmp_path, **options)
    for number in (1, 2):
        (tmp_path / "evaluations" / f"000{number}" / "result.json").unlink()
    (tmp_path / "evaluations" / "0002" / "answers.jsonl").unlink()
    with pytest.raises(Stopped):
        run("online_dpo", tmp_path, StopsAt(1), **options)  # about the answers that were gone
    judge = StopsAt(9)
    _, again = run("online_dpo", tmp_path, judge, **options)
    assert results == again
    assert judge.left == 8, "judgements of other answers are not kept"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompts": ASKED[:7]}, "other prompts"),
        ({"sampling": SamplingSettings(max_new_tokens=5, temperature=0.0)}, "other sampling"),
        ({"baseline": ["x"] * 8}, "other baseline"),
    ],
)
def test_evaluations_that_would_not_compare_are_refused(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    evaluated(dpo(tmp_path), tmp_path).begin(resumed=False)
    with pytest.raises(PrefoptError, match=words):
        evaluated(dpo(tmp_path), tmp_path, task_of(**changed)).begin(resumed=True)


def test_a_judge_that_has_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    judges = iter([(Noisy(fine), {"kind": "rule"}), (Noisy(fine), {"kind": "another"})])
    task = EvaluationTask(ASKED, lambda trainer: next(judges), 1, GREEDY)
    trainer = dpo(tmp_path)
    evaluated(trainer, tmp_path, task)
    with pytest.raises(PrefoptError, match=r"found the judge .*another.*earlier evaluations"):
        trainer.train()


def test_a_baseline_that_is_gone_cannot_be_made_of_moved_weights(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run("dpo", tmp_path, None, 5, save_strategy="steps", save_steps=2)
    (tmp_path / "evaluations" / "baseline.jsonl").unlink()
    with pytest.raises(PrefoptError, match=r"baseline\.jsonl: .* are gone; restore the file"):
        run("dpo", tmp_path, save_strategy="steps", save_steps=2)


def test_a_judgement_that_is_no_number_is_an_error_of_a_model(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    evaluated(trainer, tmp_path, task_of(Said(np.nan)))
    with pytest.raises(PrefoptError, match="not finite"):
        trainer.train()


# --- an early end --------------------------------------------------------------------------------


def late(name: str, folder: Path, judge: Judge, limit: float | None, **options: Any) -> Evaluation:
    """A run of four rounds or epochs, of three steps or two, under a judge of one's own."""
    parts = {"num_train_epochs": 4} if name == "dpo" else {"rounds": 4}
    trainer = MADE[name](folder / "checkpoints", **parts | options)
    evaluation = evaluated(trainer, folder, task_of(judge, stop_on_drop=limit))
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return evaluation


@pytest.mark.parametrize("name", ["dpo", "online_dpo"])
def test_a_run_that_got_worse_ends(name: str, tmp_path: Path) -> None:
    evaluation = late(name, tmp_path, Said(0.6, 0.8, 0.55, 0.9), 20)
    results = evaluation.finish()
    assert [each["after"] for each in results] == [1, 2, 3]
    steps = results[0]["step"]
    assert evaluation.trainer.state.global_step == 3 * steps
    unit = "epoch" if name == "dpo" else "round"
    assert evaluation.stopped == (
        f"after {unit} 3 the win rate is 55.0; on the same prompts it was 25.0 points higher "
        f"after {unit} 2 (p = 0.0078), and stop_on_drop is 20"  # 2 of 256 patterns of signs
    )


@pytest.mark.parametrize(
    ("said", "limit", "ends"),
    [
        ((0.6, 0.8, 0.55, 0.4), None, 4),  # not asked to
        ((0.6, 0.8, 0.55, 0.4), 30, 4),  # 40 points below at the end, when there is no more to stop
        ((0.6, 0.55, 0.5, 0.45), 12, 4),  # 15 below its best at the end, 10 before
        ((0.2, 0.9, 0.9, 0.9), 10, 1),  # below the start, which is 50
        ((0.6, [0.9] * 4 + [0.1] * 4, 0.6, 0.6), 5, 4),  # 10 below, but the prompts disagree
        ((0.6, [0.3] * 7 + [0.6], 0.6, 0.6), 5, 2),
        ((0.6, [0.1] * 5 + [0.6] * 3, 0.6, 0.6), 5, 4),  # five falls may be noise: p = 1/16
        ((0.6, [0.1] + [0.6] * 7, 0.6, 0.6), 5, 4),  # and one says nothing
    ],
)
def test_only_a_fall_that_is_large_and_no_noise_ends_a_run(
    said: Any, limit: float | None, ends: int, tmp_path: Path
) -> None:
    evaluation = late("online_dpo", tmp_path, Said(*said), limit)
    assert len(evaluation.finish()) == ends
    assert (evaluation.stopped is None) == (ends == 4)


@pytest.mark.parametrize("name", ["dpo", "online_dpo"])
@pytest.mark.parametrize("save_strategy", ["epoch", "no"])
def test_a_run_that_ended_early_ends_there_again(
    name: str, save_strategy: str, tmp_path: Path
) -> None:
    first = late(name, tmp_path, Said(0.8, 0.3), 20, save_strategy=save_strategy)
    again = late(name, tmp_path, Said(), 20, save_strategy=save_strategy)  # killed before the end
    assert again.stopped == first.stopped is not None
    assert again.finish() == first.finish()
    assert again.trainer.state.global_step == first.trainer.state.global_step
    assert equal(weights(first.trainer.model), weights(again.trainer.model))
