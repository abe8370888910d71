"""The alarm: the judge of training is pleased more and more, a held-out judge less and less."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation_in_training import ASKED, GREEDY, Noisy, Said, metrics
from test_rounds import Graded, fine, make_trainer, weights
from test_rounds import equal as equal_weights

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.evaluation import Evaluation, EvaluationTask
from prefopt.evaluation_alarm import Judged, Watch, alarm_message, p_greater, watch
from prefopt.judge import Judge
from prefopt.run_folder import MetricsFile
from prefopt.trainers.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.usefixtures("frozen_heap")

PROMPTS = 64
UNIT = {"unit": "round", "baseline_mean_length": 40.0}


def judged(after: int, held_out: float, training: float, prompts: int = PROMPTS) -> Judged:
    return Judged(after, np.full(prompts, held_out), np.full(prompts, training))


# --- the test ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_p_value_is_never_below_that_of_all_patterns_of_signs(seed: int) -> None:
    draws = np.random.default_rng(seed)
    count = int(draws.integers(1, 11))
    difference = draws.normal(0.4, 1, count) * draws.choice([0.1, 1, 5], count)
    signs = np.array(list(product((-1, 1), repeat=count)))
    sums = signs @ np.abs(difference)
    exact = float(np.mean(sums >= difference.sum() - 1e-12))
    assert exact <= p_greater(difference) + 1e-12 <= 1 + 1e-12


def test_the_p_value_by_hand() -> None:
    # nine equal differences: z = 3, P(N > 3) = 0.0013499, P(N > sqrt 2) = 0.0786496
    assert p_greater(np.full(9, 0.2)) == pytest.approx(0.0013499 / (4 * 0.0786496), rel=1e-4)
    assert p_greater(np.zeros(9)) == 1
    assert p_greater(np.full(9, -0.2)) == 1
    assert p_greater(np.array([])) == 1


# --- the rule ------------------------------------------------------------------------------------


def test_a_fall_by_one_judge_with_a_rise_by_the_other_alarms() -> None:
    found = watch([judged(0, 0.5, 0.5), judged(1, 0.7, 0.8), judged(2, 0.6, 0.9)], planned=4)
    assert found is not None
    assert found.alarming
    assert (found.since, found.held_out, found.training) == (
        1, pytest.approx((70, 60)), pytest.approx((80, 90)),
    )  # fmt: skip
    assert found.level == pytest.approx(0.05 / 10)  # four evaluations and the start: ten pairs


@pytest.mark.parametrize(
    "rates",
    [
        [(0.5, 0.5), (0.6, 0.7), (0.7, 0.8)],  # both rise
        [(0.5, 0.5), (0.7, 0.8), (0.6, 0.7)],  # both fall: no over-optimisation
        [(0.5, 0.5), (0.7, 0.8), (0.685, 0.9)],  # a fall of less than two points may be a waver
        [(0.5, 0.5), (0.7, 0.8), (0.7, 0.9)],  # what the held-out judge does not see
        [(0.5, 0.5), (0.7, 0.8), (0.6, 0.8)],  # a fall that training's own judge does not pay for
        [(0.5, 0.5)],
    ],
)
def test_nothing_else_alarms(rates: list[tuple[float, float]]) -> None:
    found = watch([judged(n, *each) for n, each in enumerate(rates)], planned=4)
    assert found is None or not found.alarming


def test_a_fall_below_the_start_needs_no_better_policy_in_between() -> None:
    found = watch([judged(0, 0.5, 0.5), judged(1, 0.4, 0.7)], planned=4)
    assert found is not None
    assert found.alarming
    assert found.since == 0


def test_the_level_is_shared_by_all_pairs_that_the_run_will_compare() -> None:
    fallen = [judged(0, 0.5, 0.5, prompts=16), judged(1, 0.4, 0.7, prompts=16)]
    few, many = watch(fallen, planned=2), watch(fallen, planned=40)
    assert few is not None
    assert many is not None
    assert few.p_fall == many.p_fall == pytest.approx(3.178 * 3.167e-5, rel=1e-3)  # z = 4
    assert few.alarming
    assert not many.alarming
    assert many.level == pytest.approx(0.05 / 820)


def test_prompts_that_a_judge_could_not_read_say_nothing() -> None:
    then, now = judged(1, 0.9, 0.5), judged(2, 0.1, 0.9)
    then.held_out[: PROMPTS // 2] = np.nan
    now.held_out[PROMPTS // 2 :] = np.nan
    assert watch([then, now], planned=2) is None
    now.held_out[PROMPTS // 2 :] = 0.1
    found = watch([then, now], planned=2)
    assert found is not None
    assert found.held_out == pytest.approx((90, 10))


def test_the_chance_of_a_false_alarm_holds_where_the_held_out_judge_sees_no_change() -> None:
    """The worst case: training's own judge rises for sure, the other's rate only trembles."""
    draws = np.random.default_rng(0)
    fired = 0
    for _ in range(200):
        noise = draws.random((11, PROMPTS)) < 0.6
        rows = [Judged(n, row.astype(float), np.full(PROMPTS, 0.5 + n / 25)) for n, row in
                enumerate(noise)]  # fmt: skip
        looks = (watch(rows[: n + 1], planned=10) for n in range(1, 11))
        fired += any(found is not None and found.alarming for found in looks)
    assert fired <= 10  # 5 % of 200


def test_the_message_says_who_saw_what() -> None:
    found = Watch(3, (71.2, 60.1), 2e-6, (80.4, 97.0), 1e-9, 9e-4)
    now = {**UNIT, "after": 7, "mean_length": 88.4, "kl": 6.04}
    then = {**UNIT, "after": 3, "mean_length": 52.0, "kl": 1.2}
    assert alarm_message(found, then, now) == (
        "over-optimisation: from round 3 to round 7 the win rate rose from 80.4 to 97.0 "
        "(p = 1e-09) by the judge that training asks, and fell from 71.2 to 60.1 (p = 2e-06, "
        "alarm below 0.0009) by the held-out judge; meanwhile answers from 52 to 88 characters and "
        "KL from 1.20 to 6.04 nats. The policy of round 3 was better"
    )
    from_start = alarm_message(Watch(0, (50, 40), 1e-6, (50, 70), 1e-9, 1e-3), None, now)
    assert "from the start to round 7" in from_start
    assert "answers from 40 to 88 characters and KL from 0.00 to 6.04 nats" in from_start
    del now["kl"]
    assert "KL" not in alarm_message(found, then, now)


# --- in a run ------------------------------------------------------------------------------------


class Listens(Graded):
    """Judges samples by a rule, and says one thing of the answers in each evaluation."""

    def __init__(self, *rates: float) -> None:
        super().__init__(fine)
        self.rates = list(rates)

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        if list(prompts) != ASKED:
            return super().prefer(prompts, a, b)
        return np.full(len(prompts), self.rates.pop(0))


def watched(folder: Path, held_out: Judge, training: Judge, **options: Any) -> Evaluation:
    """Three rounds, each evaluated on eight prompts; not yet trained."""
    trainer = make_trainer(
        folder / "checkpoints",
        judge=training,
        callbacks=[MetricsFile(folder / "metrics.jsonl")],
        **{"rounds": 3, **options},
    )
    judge = (held_out, {"kind": "rule"})
    task = EvaluationTask(ASKED, lambda trainer: judge, 1, GREEDY, watch=True)
    return Evaluation(trainer, task, folder / "evaluations", "hash")


def go_on(evaluation: Evaluation) -> None:
    checkpoint = last_complete_checkpoint(Path(evaluation.trainer.args.output_dir))
    at = None if checkpoint is None else str(checkpoint)
    evaluation.trainer.train(resume_from_checkpoint=at)


@pytest.mark.parametrize("save_strategy", ["epoch", "no"])
def test_the_alarm_ends_a_run_and_ends_it_there_again(save_strategy: str, tmp_path: Path) -> None:
    held_out, training = Said(0.8, 0.6), Listens(0.7, 0.9)
    first = watched(tmp_path, held_out, training, save_strategy=save_strategy)
    alarm = (
        r"^over-optimisation: from round 1 to round 2 the win rate rose from 70.0 to 90.0 .* fell "
        r"from 80.0 to 60.0 \(p = 0.007, alarm below 0.008\) .*The policy of round 1 was better\. "
        r"Use a checkpoint "
    )
    with pytest.raises(PrefoptError, match=alarm):
        first.trainer.train()
    again = watched(tmp_path, Said(), Listens(), save_strategy=save_strategy)
    with pytest.raises(PrefoptError, match=alarm):
        go_on(again)
    assert again.trainer.state.global_step == first.trainer.state.global_step
    assert equal_weights(weights(first.trainer.model), weights(again.trainer.model))
    folder = tmp_path / "evaluations" / "0002"
    result = json.loads((folder / "result.json").read_text())
    assert result["alarm"].startswith("over-optimisation: from round 1 to round 2")
    assert result["training_win_rate"] == pytest.approx(90)
    assert result["watch"]["since"] == 1
    assert result["watch"]["level"] == pytest.approx(0.05 / 6)
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").open()]
    assert {(row["preference"], row["training_preference"]) for row in rows} == {(0.6, 0.9)}
    logged = [row for row in metrics(tmp_path) if "evaluation/alarm" in row]
    assert [row["evaluation/alarm"] for row in logged] == [0, 1]
    assert [row["evaluation/training_win_rate"] for row in logged] == pytest.approx([70, 90])


def test_a_run_that_is_only_warned_goes_on_from_there(tmp_path: Path) -> None:
    saved = {"save_strategy": "epoch"}
    first = watched(tmp_path, Said(0.8, 0.6), Listens(0.7, 0.9), **saved)
    with pytest.raises(PrefoptError, match="over-optimisation"):
        first.trainer.train()
    told: list[str] = []
    second = watched(tmp_path, Said(0.9), Listens(0.9), **saved)
    second.trainer.end_early = lambda error: told.append(str(error))  # type: ignore[method-assign]
    go_on(second)
    assert ["alarm" in each for each in second.finish()] == [False, True, False]
    assert len(told) == 1


def test_a_run_that_is_watched_ends_with_the_same_weights(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "plain", rounds=3, disable_dropout=True)
    plain.train()
    evaluation = watched(tmp_path, Noisy(fine), Noisy(fine), disable_dropout=True)
    evaluation.trainer.train()
    assert all("watch" in each for each in evaluation.finish())
    assert equal_weights(weights(plain.model), weights(evaluation.trainer.model))


def test_an_alarm_at_the_end_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="prefopt")
    evaluation = watched(tmp_path, Said(0.8, 0.8, 0.6), Listens(0.7, 0.7, 0.9))
    evaluation.trainer.train()
    assert "alarm" in evaluation.finish()[-1]
    assert "over-optimisation: from round 1 to round 3" in caplog.text


def test_a_judge_is_not_watched_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="prefopt")
    judge = Graded(fine)
    evaluation = watched(tmp_path, judge, judge)
    evaluation.trainer.train()
    assert all("training_win_rate" not in each for each in evaluation.finish())
    assert caplog.text.count("over-optimisation is not watched") == 1
