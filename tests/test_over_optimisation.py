"""A tiny policy that games the length of what it is paid by: the alarm comes before the harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from length_gamers import (
    A_ROUND,
    LONGEST,
    POLICY,
    PROMPTS,
    gamed,
    nice,
    outcome,
    too_long,
    train_seed,
)
from test_rounds import STOPS, Graded, make_trainer, number, tiny_policy

from prefopt.errors import PrefoptError
from prefopt.evaluation import Evaluation, EvaluationTask
from prefopt.rollout.engine import SamplingSettings

pytestmark = pytest.mark.usefixtures("frozen_heap")


def held_out(text: str) -> float:
    """A rule that sees length less sharply than gold does, and is noisy."""
    words = text.split()
    return 4 * nice(words) - 3 * too_long(words) + number(text) / 2**32 - 0.5


def test_the_alarm_ends_training_before_gold_has_fallen_below_the_start(tmp_path: Path) -> None:
    """With rules for judges, in 7 to 18 s: a policy has to learn first what it overdoes."""
    rounds, evaluated = 20, 192
    model = tiny_policy()
    model.generation_config.eos_token_id = STOPS
    trainer = make_trainer(
        tmp_path / "checkpoints",
        model=model,
        judge=Graded(lambda text: gamed(text, paid=0.15)),
        prompts=PROMPTS[evaluated : evaluated + rounds * A_ROUND],
        sampling=SamplingSettings(samples_per_prompt=4, max_new_tokens=LONGEST),
        rounds=rounds,
        num_train_epochs=1,
        beta=POLICY["beta"],
        learning_rate=POLICY["learning_rate"],
        seed=0,
        per_device_train_batch_size=POLICY["per_device_train_batch_size"],
        logging_steps=rounds * A_ROUND,
    )
    judge = (Graded(held_out), {"kind": "rule"})
    sampling = SamplingSettings(max_new_tokens=LONGEST, temperature=0.7, seed=1)
    task = EvaluationTask(PROMPTS[:evaluated], lambda trainer: judge, 1, sampling, watch=True)
    Evaluation(trainer, task, tmp_path / "evaluations", "hash")
    with pytest.raises(PrefoptError, match="over-optimisation: from round"):
        trainer.train()
    found = outcome(tmp_path / "evaluations")
    start, *scores = found.gold
    assert found.alarms == [len(scores)], "the last evaluation is the one that alarmed"
    assert max(scores) > start + 0.2, "gold had risen"
    assert scores[-1] < max(scores), "and was falling"
    assert scores[-1] >= start


@pytest.mark.slow
@pytest.mark.parametrize("seed", [20, 21])
def test_trained_judges_alarm_in_time_and_an_honest_one_never(seed: int, tmp_path: Path) -> None:
    """Two minutes on an idle machine: three reward models and two policies are trained."""
    found = train_seed(seed, tmp_path)
    gold = found["gamed"].gold
    assert found["gamed"].alarms
    best, *falling = found["gamed"].until_the_alarm()
    assert best > gold[0] + 0.2, "gold had risen"
    assert falling, "and was falling"
    assert min(falling) >= gold[0], "but was not below the start yet"
    assert gold[-1] < gold[0], "as it is in the end, without an alarm"
    assert found["honest"].alarms == []
    assert found["honest"].gold[-1] > gold[0] + 0.2
