"""A tiny policy that games the length of what it is paid by: the alarm comes before the harm.

An answer is good (`gold`) if its words are nice and it is no longer than twelve. The reward that
can be gamed knows nice words, but pays for length without end; an honest one is the gold score
itself. The held-out judge sees length less sharply than it should, and is noisy. Gold measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rounds import STOPS, Graded, distinct_prompts, make_trainer, number, tiny_policy

from prefopt.errors import PrefoptError
from prefopt.evaluation import Evaluation, EvaluationTask
from prefopt.rollout.engine import SamplingSettings

pytestmark = pytest.mark.usefixtures("frozen_heap")

ROUNDS, EVALUATED, A_ROUND = 20, 192, 48
PROMPTS = distinct_prompts(EVALUATED + ROUNDS * A_ROUND)


def nice(words: list[str]) -> float:
    return sum(number(word) % 3 == 0 for word in words) / max(1, len(words))


def too_long(words: list[str]) -> float:
    return max(0, len(words) - 12) / 12


def gold(text: str) -> float:
    return nice(text.split()) - too_long(text.split())


def gamed(text: str) -> float:
    return 6 * nice(text.split()) + 0.15 * len(text.split())


def honest(text: str) -> float:
    return 6 * gold(text)


def held_out(text: str) -> float:
    words = text.split()
    return 4 * nice(words) - 3 * too_long(words) + number(text) / 2**32 - 0.5


@dataclass(frozen=True)
class Outcome:
    """The gold score of the start and of each evaluation, and the evaluations that alarmed."""

    gold: list[float]
    alarms: list[int]


def optimised(reward: Callable[[str], float], seed: int, folder: Path, stop: bool) -> Outcome:
    """Online DPO from random weights, to the alarm or to its end."""
    model = tiny_policy(seed)
    model.generation_config.eos_token_id = STOPS
    trainer = make_trainer(
        folder / "checkpoints",
        model=model,
        judge=Graded(reward),
        prompts=PROMPTS[EVALUATED:],
        sampling=SamplingSettings(samples_per_prompt=4, max_new_tokens=24),
        rounds=ROUNDS,
        num_train_epochs=1,
        beta=0.03,
        learning_rate=3e-3,
        seed=seed,
        per_device_train_batch_size=16,
        logging_steps=ROUNDS * A_ROUND,
    )
    judge = (Graded(held_out), {"kind": "rule"})
    sampling = SamplingSettings(max_new_tokens=24, temperature=0.7, seed=1)
    task = EvaluationTask(PROMPTS[:EVALUATED], lambda trainer: judge, 1, sampling, watch=True)
    evaluation = Evaluation(trainer, task, folder / "evaluations", "hash")
    if stop:
        with pytest.raises(PrefoptError, match="over-optimisation: from round"):
            trainer.train()
    else:
        trainer.end_early = lambda error: None  # type: ignore[method-assign]  # only warned
        trainer.train()
        evaluation.finish()
    return outcome(folder / "evaluations")


def outcome(folder: Path) -> Outcome:
    def gold_of(path: Path) -> float:
        rows = (json.loads(line) for line in path.open())
        return float(np.mean([gold(row["completion"]) for row in rows]))

    results: list[dict[str, Any]] = []
    scores = [gold_of(folder / "baseline.jsonl")]
    for path in sorted(folder.glob("*/result.json")):
        results.append(json.loads(path.read_text()))
        scores.append(gold_of(path.parent / "answers.jsonl"))
    return Outcome(scores, [result["after"] for result in results if "alarm" in result])


def test_the_alarm_ends_training_before_gold_has_fallen_below_the_start(tmp_path: Path) -> None:
    """Eighteen seconds: a policy has to learn first what it then overdoes."""
    found = optimised(gamed, seed=0, folder=tmp_path, stop=True)
    start, *scores = found.gold
    assert len(found.alarms) == 1
    assert found.alarms == [len(scores)], "the last evaluation is the one that alarmed"
    assert max(scores) > start + 0.2, "gold had risen"
    assert scores[-1] < max(scores), "and was falling"
    assert scores[-1] >= start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_what_a_warning_would_have_led_to(seed: int, tmp_path: Path) -> None:
    found = optimised(gamed, seed, tmp_path, stop=False)
    start, *scores = found.gold
    assert scores[-1] < start, "in the end gold is below the start"
    assert scores[found.alarms[0] - 1] >= start, "the alarm came before that"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_an_honest_reward_alarms_nobody(seed: int, tmp_path: Path) -> None:
    found = optimised(honest, seed, tmp_path, stop=False)
    assert found.alarms == []
    assert found.gold[-1] > found.gold[0] + 0.2
