"""Guards on samples and logs, each set off by a tiny run: what is said, saved and gone on with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_folders import report
from test_rounds import PROMPTS, Graded, Make, brief_policy, equal, fine, make_trainer, weights
from transformers import Trainer

from prefopt.errors import PrefoptError
from prefopt.reward_models import RuleJudge
from prefopt.rounds.store import read_lines
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.bounds import Bounds, BoundsGuard
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.sft import SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes trainers, each in a run folder, on the same prompts and weights."""
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


def watched(trainer: Any, **bounds: Any) -> BoundsGuard:
    return BoundsGuard(trainer, Bounds(**bounds), Path(trainer.args.output_dir) / "guards.jsonl")


def found(trainer: Any) -> list[dict[str, Any]]:
    """What guards wrote down, but for what is said without a bound."""
    path = Path(trainer.args.output_dir) / "guards.jsonl"
    return [row for row in read_lines(path) if row["bound"]] if path.exists() else []


def newest(trainer: Any) -> Path | None:
    return last_complete_checkpoint(Path(trainer.args.output_dir))


class Level(Graded):
    """Finds every sample as good as any other."""

    def __init__(self) -> None:
        super().__init__(lambda text: 1.0)


STEPS = {"rounds": 6, "prompts": PROMPTS[:8], "per_device_train_batch_size": 2}


def test_a_kl_beyond_its_bound_ends_the_run_which_goes_on_with_another(make: Make) -> None:
    """Saved at the step it was seen at, though nothing else is saved, and bit for bit the same."""
    whole = make("whole", "nash_mp", model=brief_policy(), **STEPS)
    watched(whole, max_kl=1e-9, action="warn")
    whole.train()
    line = found(whole)[0]
    assert line["guard"] == "max_kl"
    assert 0 < line["step"] < whole.state.global_step
    trainer = make("run", "nash_mp", model=brief_policy(), **STEPS)
    watched(trainer, max_kl=1e-9)
    step = line["step"]
    with pytest.raises(PrefoptError, match=f"a guard ends training at step {step}, .*kl is ") as e:
        trainer.train()
    for words in ("above 1e-09", "guards.max_kl", "trainer.learning_rate", "guards.action=warn"):
        assert words in str(e.value)
    checkpoint = newest(trainer)
    assert checkpoint is not None
    assert checkpoint.name == f"checkpoint-{step}"
    assert [row["action"] for row in found(trainer)] == ["stop"]
    resumed = make("run", "nash_mp", model=brief_policy(), **STEPS)
    watched(resumed, max_kl=1e-9, action="warn")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert equal(weights(whole.model), weights(resumed.model))


def test_the_kl_of_an_evaluation_counts(make: Make) -> None:
    trainer = make()
    watched(trainer, max_kl=2.0)
    Trainer.log(trainer, {"evaluation/kl": 1.9})
    trainer.safe_point()
    Trainer.log(trainer, {"evaluation/kl": 2.1})
    with pytest.raises(PrefoptError, match=r"evaluation/kl is 2\.1 nats, above 2"):
        trainer.safe_point()


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"max_mean_length": 3.5}, r"samples have [\d.]+ tokens on average, above 3.5 .*penalty"),
        ({"min_finished": 0.9}, r"[\d.]+% of samples end by themselves .*below 90.0%.*max_new_tok"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_samples_beyond_a_bound_end_the_run_before_it_trains_on_them(
    make: Make, bounds: dict[str, Any], words: str
) -> None:
    trainer = make("run")
    watched(trainer, **bounds)
    start = weights(trainer.model)
    with pytest.raises(PrefoptError, match=f"at step 0, .*round 1: {words}"):
        trainer.train()
    assert equal(start, weights(trainer.model))
    assert newest(trainer) is None, "there is nothing to save at step 0"
    assert (trainer.rounds_dir / "0000" / "round.json").exists()
    with pytest.raises(PrefoptError, match="at step 0"):  # the same command meets the same bound
        again = make("run")
        watched(again, **bounds)
        again.train()
    assert len(found(again)) == 1, "found again, it stands in the file once"


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("online_dpo", {"ties": "keep"}), ("nash_mp", STEPS), ("ppo", STEPS)],
)
def test_a_judge_that_tells_nothing_apart_ends_the_run(
    make: Make, algorithm: str, options: dict[str, Any]
) -> None:
    trainer = make("run", algorithm, judge=Level(), **options)
    watched(trainer, equal_scores=2)
    with pytest.raises(PrefoptError, match="round 2: the judge told no sample apart, in 2 rounds"):
        trainer.train()
    step = trainer.state.global_step
    checkpoint = newest(trainer)
    assert checkpoint is not None, "the first round was trained on"
    assert checkpoint.name == f"checkpoint-{step}"
    resumed = make("run", algorithm, judge=Level(), **options)
    watched(resumed, equal_scores=2)
    with pytest.raises(PrefoptError, match=f"at step {step}, .* in 2 rounds in a row"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_rounds_in_a_row_begin_anew_with_one_that_differs(make: Make) -> None:
    class Sometimes(RuleJudge):
        asked = 0

        def __init__(self) -> None:
            super().__init__(self.grade)

        def grade(self, prompts: Any, completions: Any) -> list[float]:
            self.asked += 1
            return [fine(text) if self.asked % 2 == 0 else 1.0 for text in completions]

    trainer = make("run", "ppo", judge=Sometimes(), **STEPS)
    guard = watched(trainer, equal_scores=2)
    trainer.train()
    assert not found(trainer)
    assert guard.equal < 2


def test_a_warning_comes_each_time_a_bound_begins_to_be_crossed(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make("run")
    guard = watched(trainer, max_mean_length=10.0, action="warn")
    caplog.set_level(logging.WARNING, logger="prefopt")
    for index, length in enumerate((9.0, 11.0, 12.0, 8.0, 13.0)):
        trainer.state.global_step = index
        guard.after_sampling({"round": index, "rollout/length": length}, begins=index != 2)
    assert [row["step"] for row in found(trainer)] == [1, 4]
    assert len(caplog.records) == 2
    trainer.safe_point()


def test_no_end_and_empty_samples_are_warned_of_without_a_bound(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make("run")  # of six tokens, which none of its samples ends within
    watched(trainer)
    caplog.set_level(logging.WARNING, logger="prefopt")
    trainer.train()
    said = [record.message for record in caplog.records if "guard" in record.message]
    assert len(said) == 1, "once, though there are two rounds"
    assert "round 1: no sample ended by itself (EOS); look at the chat template" in said[0]
    caplog.clear()
    empty = watched(make("empty"))
    for index in range(2):
        empty.after_sampling({"round": index, "rollout/empty": 1.0, "rollout/finished": 1.0}, True)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "guard at step 0: round 1: all samples are empty"
    ]


def test_a_guard_that_is_late_lets_the_run_end(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make("run", max_steps=3)
    guard = watched(trainer, max_kl=1.0)
    step = trainer.after_step

    def last() -> None:
        step()
        if trainer.state.global_step == 3:
            guard.found("max_kl", 2.0, 1.0, "far away")

    trainer.after_step = last  # type: ignore[method-assign]
    caplog.set_level(logging.WARNING, logger="prefopt")
    trainer.train()
    assert trainer.state.global_step == 3
    assert "the last step was taken by then" in caplog.text
    trainer.safe_point()


def test_the_evaluation_of_what_training_ended_with_ends_nothing(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made once the last step is taken; `prefopt train` comes to a safe point after it."""
    trainer = make("run", rounds=1)
    watched(trainer, max_kl=2.0)
    trainer.train()
    caplog.set_level(logging.WARNING, logger="prefopt")
    Trainer.log(trainer, {"evaluation/kl": 2.1})
    trainer.safe_point()
    assert [row["guard"] for row in found(trainer)] == ["max_kl"]
    assert "the last step was taken by then" in caplog.text


def test_a_resumed_run_warns_of_what_lasts_once(make: Make) -> None:
    """Of a KL and a length beyond bounds, and of samples without an end, from the first round on.

    Another bound is another warning.
    """
    options = {**STEPS, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    bounds = {"max_kl": 1e-9, "max_mean_length": 0.5, "action": "warn"}
    whole = make("run", "nash_mp", model=brief_policy(), **options)
    watched(whole, **bounds)
    whole.train()
    path = Path(whole.args.output_dir) / "guards.jsonl"
    first = read_lines(path)
    assert {row["guard"] for row in first} >= {"max_kl", "max_mean_length"}
    checkpoint = str(Path(whole.args.output_dir) / "checkpoint-6")
    resumed = make("run", "nash_mp", model=brief_policy(), **options)
    watched(resumed, **bounds)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert read_lines(path) == first
    other = make("run", "nash_mp", model=brief_policy(), **options)
    watched(other, **bounds | {"max_mean_length": 0.6})
    other.train(resume_from_checkpoint=checkpoint)
    more = [row for row in read_lines(path) if row not in first]
    assert [(row["guard"], row["bound"]) for row in more] == [("max_mean_length", 0.6)]


def dpo(tiny_llama: Any, random_trees: Any, folder: Path) -> DPOTrainer:
    args = DPOConfig(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    return DPOTrainer(tiny_llama(), args, TreeDataset(random_trees([2] * 8)))


def test_bounds_that_cannot_be_watched_are_named(
    tiny_llama: Any, random_trees: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="prefopt")
    trainer = dpo(tiny_llama, random_trees, tmp_path)
    watched(trainer)
    trainer.train()
    assert not caplog.records, "the default needs no word"
    trainer = dpo(tiny_llama, random_trees, tmp_path)
    watched(trainer, max_kl=1.0, max_mean_length=5.0, min_finished=0.5, equal_scores=1)
    trainer.train()
    (said,) = [record.message for record in caplog.records]
    for name in ("max_kl", "max_mean_length", "min_finished", "equal_scores"):
        assert f"guards.{name}" in said
    assert "this algorithm draws no samples" in said


def test_a_kl_that_nothing_measures_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="prefopt")
    trainer = make("run", rounds=1)  # online DPO measures it from the second round on
    watched(trainer, max_kl=1.0, min_finished=None)
    trainer.train()
    assert "guards.max_kl was not watched: this run measured no KL" in caplog.text


def test_the_spread_of_a_round(make: Make) -> None:
    """Checked against scores by hand: the judge's largest difference within each prompt."""
    trainer = make("run", rounds=1)
    trainer.train()
    (line,) = read_lines(trainer.rounds_dir / "0000" / "round.json")
    rows = read_lines(next(trainer.rounds_dir.glob("0000/draw-0/judgements-*")))
    scores = [row["scores"] for row in rows]
    assert line["judge/spread"] == pytest.approx(np.mean([max(s) - min(s) for s in scores]))
    assert line["rollout/empty"] == 0


def test_the_report_shows_what_guards_found(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    message = "round 2: <b>7 tokens</b>"
    line = {"guard": "max_mean_length", "step": 12, "message": message}
    (tmp_path / "guards.jsonl").write_text(json.dumps(line) + "\n")
    text, page = report(tmp_path)
    assert "Guards" in page.headings
    assert f"{tmp_path.name}, step 12: {message}" in page.text
    assert "<b>7 tokens</b>" not in text


def test_sft_stops_at_a_loss_that_is_no_number(tiny_llama: Any, tmp_path: Path) -> None:
    from test_rounds import TOKENIZER

    model = tiny_llama(vocab_size=len(TOKENIZER))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[],
        disable_tqdm=True, save_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"prompt_ids": [5, 6], "completion_ids": [7, 8 + n]} for n in range(4)]
    trainer = SFTTrainer(model, args, rows, processing_class=TOKENIZER)
    watched(trainer)
    with pytest.raises(PrefoptError, match="step 1: not finite: loss, gradient") as stop:
        trainer.train()
    (line,) = read_lines(tmp_path / "guards.jsonl")
    assert (line["guard"], line["action"], line["step"]) == ("not_finite", "stop", 0)
    assert line["message"] == str(stop.value)
    (path,) = (tmp_path / "non-finite").iterdir()
    (part,) = json.loads(path.read_text())["micro_batches"]
    assert part["columns"]["input_ids"][0][:2] == [5, 6]
