"""Paired comparisons: exact p-values by hand, and invariants."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from prefopt.errors import PrefoptError
from prefopt.eval.paired import paired_comparison


def soft(n, seed):
    rng = np.random.default_rng(seed)
    a = rng.beta(0.5, 0.5, n)
    return a, np.clip(a + rng.normal(0.02, 0.3, n), 0, 1)


def test_three_wins_by_hand():
    # Of the 8 patterns of signs two are as extreme: all plus and all minus.
    result = paired_comparison([1, 1, 0.5], [0, 0.5, 0])
    assert result.p_value == 2 / 8
    assert result.difference == pytest.approx(100 * 2 / 3)
    assert result.ci[0] < 0 < result.difference < result.ci[1] <= 100


def test_sums_by_hand():
    # Differences 1, 1, -1/2: the sum is 3/2; sums of at least 3/2 are 5/2 and 3/2, each once.
    assert paired_comparison([1, 1, 0], [0, 0, 0.5]).p_value == 2 * 2 / 8


@pytest.mark.parametrize("n", [1, 4, 300])
def test_equal_preferences_say_nothing_with_certainty(n):
    result = paired_comparison([0.7] * n, [0.7] * n)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.ci[0] < 0 < result.ci[1]


@pytest.mark.parametrize("n", [1, 5])
def test_one_difference_shows_nothing(n):
    found = paired_comparison([0.9] + [0.5] * (n - 1), [0.5] * n)
    assert found.p_value == 1
    assert found.difference == pytest.approx(40 / n)


def test_instructions_without_a_difference_do_not_change_the_p_value():
    a, b = soft(40, 0)
    longer = paired_comparison([*a, *[0.5] * 60], [*b, *[0.5] * 60])
    assert longer.p_value == paired_comparison(a, b).p_value


def test_swapping_models_mirrors():
    a, b = soft(100, 1)
    there, back = paired_comparison(a, b), paired_comparison(b, a)
    assert back.p_value == there.p_value
    assert back.difference == pytest.approx(-there.difference)
    assert back.ci == pytest.approx((-there.ci[1], -there.ci[0]))


def test_order_of_instructions_does_not_matter():
    a, b = soft(100, 2)
    order = np.random.default_rng(0).permutation(100)
    one, other = paired_comparison(a, b), paired_comparison(a[order], b[order])
    assert one.p_value == other.p_value
    assert one.ci == pytest.approx(other.ci)


def test_unjudged_instructions_are_dropped_in_pairs_and_counted():
    a, b = soft(50, 3)
    full = paired_comparison(a, b)
    result = paired_comparison([*a, math.nan, 1.0, math.nan], [*b, 0.0, math.nan, math.nan])
    assert (result.n, result.dropped) == (50, 3)
    assert (result.p_value, result.difference) == (full.p_value, full.difference)


def test_preferences_by_instruction_are_matched():
    a, b = soft(50, 4)
    one = paired_comparison(a, b)
    by_name = paired_comparison(
        {f"q{i}": x for i, x in enumerate(a)} | {"only a": 1.0},
        {f"q{i}": b[i] for i in reversed(range(50))} | {"only b": 1.0, "nor b": 0.0},
    )
    assert (by_name.n, by_name.dropped) == (50, 3)
    assert (by_name.p_value, by_name.difference) == (one.p_value, one.difference)


def test_agrees_with_the_paired_t_test_where_that_holds():
    a, b = soft(400, 5)
    expected = stats.ttest_rel(a, b)
    result = paired_comparison(a, b)
    # 9999 random patterns: a p-value of 0.002 has a standard error of 0.0004.
    assert 0.001 < expected.pvalue < 0.5
    assert result.p_value == pytest.approx(expected.pvalue, abs=0.0015)
    low, high = (100 * bound for bound in expected.confidence_interval(0.95))
    assert result.ci == pytest.approx((low, high), abs=0.3)


def test_p_values_are_uniform_when_models_are_exchangeable():
    # Exact tests: 200 simulated comparisons on 12 instructions.
    rng = np.random.default_rng(6)
    p = [paired_comparison(rng.random(12), rng.random(12)).p_value for _ in range(200)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=0.1)


def test_random_signs_never_give_zero():
    assert paired_comparison([1.0] * 100, [0.0] * 100, resamples=99).p_value == 2 / 100


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([0.5], [0.5, 0.5], "1 values and preferences_b 2"),
        ([1.5], [1.0], r"preferences_a\[0\] is 1.5.*win_probabilities"),
        ([math.nan, 1.0], [1.0, math.nan], "none was judged for both"),
        ([], [], "none was judged"),
        ([[0.5]], [0.5], "shape"),
        ({"q": 0.5}, [0.5], "by instruction"),
    ],
)
def test_unusable_preferences_are_refused(a, b, message):
    with pytest.raises(PrefoptError, match=message):
        paired_comparison(a, b)
