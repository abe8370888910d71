"""Win rates, their intervals, and calibration against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from prefopt.errors import PrefoptError
from prefopt.eval.win_rate import accuracy_by, calibration, wilson_interval, win_rate


def coverage(draw, truth: float, n: int, repeats: int = 2000) -> float:
    """Share of simulated evaluations whose interval holds the true win rate."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(repeats):
        low, high = win_rate(draw(rng, n)).ci
        hits += low <= 100 * truth <= high
    return hits / repeats


def test_wins_ties_and_losses_by_hand():
    result = win_rate([1, 1, 0.5, 0])
    assert result.win_rate == 62.5
    assert (result.wins, result.ties, result.losses, result.n) == (2, 1, 1, 4)
    # Deviations .375, .375, -.125, -.625: sum of squares .6875, variance .6875 / 3.
    assert result.standard_error == pytest.approx(100 * math.sqrt(0.6875 / 3) / 2)


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (3, 10), (10, 10), (437, 805)])
def test_interval_of_wins_and_losses_is_wilsons(wins, n):
    expected = stats.binomtest(wins, n).proportion_ci(0.95, method="wilson")
    result = win_rate([1.0] * wins + [0.0] * (n - wins))
    assert result.ci == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


def test_soft_interval_by_hand():
    # Padded with 0 and 1: mean 1/2, variance (4 * 0 + 2 * 1/4) / 6 = 1/12, dispersion 1/3,
    # so four ties weigh as much as 12 wins and losses.
    assert win_rate([0.5] * 4).ci == pytest.approx([100 * x for x in wilson_interval(0.5, 12)])


def test_interval_tends_to_the_normal_one():
    soft = np.random.default_rng(0).beta(3, 2, size=20_000)
    result = win_rate(soft)
    low, high = result.ci
    assert (high - low) / 2 == pytest.approx(1.96 * result.standard_error, rel=0.01)
    assert (high + low) / 2 == pytest.approx(result.win_rate, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 3, 1000])
def test_equal_preferences_never_give_certainty(value, n):
    result = win_rate([value] * n)
    low, high = result.ci
    assert 0 <= low <= 100 * value + 1e-9
    assert 100 * value - 1e-9 <= high <= 100
    assert high - low > 100 / (n + 4)


def test_swapping_model_and_baseline_mirrors_everything():
    values = np.random.default_rng(1).random(30)
    model, baseline = win_rate(values), win_rate(1 - values)
    assert baseline.win_rate == pytest.approx(100 - model.win_rate)
    assert baseline.ci == pytest.approx((100 - model.ci[1], 100 - model.ci[0]))
    assert (baseline.wins, baseline.losses) == (model.losses, model.wins)


@pytest.mark.parametrize("n", [10, 50, 400])
@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda rng, n: (rng.random(n) < 0.6).astype(float), 0.6),
        (lambda rng, n: (rng.random(n) < 0.95).astype(float), 0.95),
        (lambda rng, n: rng.choice([0, 0.5, 1], p=[0.2, 0.5, 0.3], size=n), 0.55),
        (lambda rng, n: rng.beta(0.6, 0.4, size=n), 0.6),
    ],
    ids=["wins", "nearly always wins", "ties", "soft"],
)
def test_interval_covers_the_truth(draw, truth, n):
    # A discrete score interval swings around 95 %; 2000 repeats have an error of 0.5 points.
    assert 0.90 <= coverage(draw, truth, n) <= 0.99


def test_repeated_samples_of_an_instruction_feign_no_precision():
    rng = np.random.default_rng(3)
    per_instruction = (rng.random(50) < 0.6).astype(float)
    repeated, groups = np.repeat(per_instruction, 8), np.repeat(np.arange(50), 8)
    assert win_rate(repeated, groups=list(groups)) == win_rate(per_instruction)
    naive = win_rate(repeated)
    assert naive.standard_error < win_rate(per_instruction).standard_error / 2


def test_groups_weigh_the_same_whatever_their_size_and_order():
    result = win_rate([1, 0, 0, 1, 1], groups=["a", "b", "b", "a", "b"])
    assert result.win_rate == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert (result.wins, result.ties, result.losses, result.n) == (1, 0, 1, 2)
    assert win_rate([1, 0], groups=["a", "a"]).ties == 1


def test_one_instruction_has_no_standard_error():
    assert math.isnan(win_rate([1.0]).standard_error)


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [
        ([], None, "one or more"),
        ([0.2, 1.5], None, r"preferences\[1\] is 1.5"),
        ([0.2, math.nan, 0.4], None, r"preferences\[1\] is nan"),
        ([[0.2]], None, "shape"),
        ([0.2, 0.3], ["a"], "1 entries for 2 values"),
    ],
)
def test_unusable_preferences_are_refused(values, groups, message):
    with pytest.raises(PrefoptError, match=message):
        win_rate(values, groups=groups)


def test_calibration_by_hand():
    # Two bins, [.5, .75) and [.75, 1]. Confidences .6, .7 | .9, .8; right: 1, 0 | 1, 1.
    result = calibration([0.6, 0.3, 0.9, 0.2], [1, 1, 1, 0], bins=2)
    assert result.accuracy == 0.75
    assert [row["count"] for row in result.table] == [2, 2]
    assert [row["confidence"] for row in result.table] == pytest.approx([0.65, 0.85])
    assert [row["accuracy"] for row in result.table] == [0.5, 1.0]
    assert result.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.15)


def test_calibration_ignores_the_order_of_the_answers():
    rng = np.random.default_rng(5)
    p = rng.random(500)
    outcome = (rng.random(500) < p).astype(float)
    flip = rng.random(500) < 0.5
    flipped = calibration(np.where(flip, 1 - p, p), np.where(flip, 1 - outcome, outcome))
    assert flipped.ece == pytest.approx(calibration(p, outcome).ece)


def test_calibrated_and_overconfident_judges_differ():
    rng = np.random.default_rng(6)
    p = rng.random(20_000)
    outcome = (rng.random(p.size) < p).astype(float)
    assert calibration(p, outcome).ece < 0.02
    # A judge that is always sure is wrong as often as min(p, 1 - p): on average 1/4.
    assert calibration((p > 0.5).astype(float), outcome).ece == pytest.approx(0.25, abs=0.02)


def test_undecided_judge_is_half_right():
    result = calibration([0.5, 0.5], [1, 1])
    assert (result.accuracy, result.ece) == (0.5, 0.0)


def test_calibration_counts_every_pair_once():
    p = np.linspace(0, 1, 101)
    table = calibration(p, np.ones(101), bins=7).table
    assert sum(row["count"] for row in table) == 101
    assert len(table) == 7


def test_accuracy_by_group():
    rows = accuracy_by([0.9, 0.2, 0.7, 0.4], [1, 1, 1, 0], ["short", "short", "long", "long"])
    assert [row["group"] for row in rows] == ["short", "long"]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0]
    assert [row["count"] for row in rows] == [2, 2]
    assert rows[0]["low"] < 0.5 < rows[0]["high"]


def test_calibration_needs_one_outcome_a_pair():
    with pytest.raises(PrefoptError, match="2 values and outcome has 1"):
        calibration([0.5, 0.6], [1.0])
