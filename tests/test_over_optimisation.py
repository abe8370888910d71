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
    optimise,
    outcome,
    too_long,
    train_judge,
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
    """Eighteen seconds, with rules for judges: a policy has to learn first what it overdoes."""
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
@pytest.mark.parametrize("seed", [0, 1])
def test_trained_judges_alarm_in_time_and_an_honest_one_never(seed: int, tmp_path: Path) -> None:
    """Two minutes: three reward models and two policies are trained."""
    judges = {name: train_judge(name, seed, tmp_path) for name in ("gamed", "honest", "held_out")}
    found = {
        name: outcome(
            optimise(name, judges[name], judges["held_out"], seed, tmp_path) / "evaluations"
        )
        for name in ("gamed", "honest")
    }
    start, *scores = found["gamed"].gold
    first = found["gamed"].alarms[0]
    assert max(scores) > start + 0.2, "gold had risen"
    assert scores[-1] < start, "without an alarm gold ends below the start"
    assert scores[first - 1] >= start, "the alarm came before that"
    assert found["honest"].alarms == []
    assert found["honest"].gold[-1] > start + 0.2
