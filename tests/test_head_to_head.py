"""The numbers of one model against another, by hand."""

from __future__ import annotations

import math

import pytest

from prefopt.errors import PrefoptError
from prefopt.eval.head_to_head import head_to_head


def test_rates_counts_and_lengths_of_a_comparison() -> None:
    found = head_to_head([1.0, 0.5, 0.0, 1.0], ["a", "bb", "ccc", "dddd"], ["", "x", "xx", "xxx"])
    assert found["win_rate"] == 62.5
    spread = math.sqrt((3 * 0.375**2 - 0.375**2 + 0.125**2 + 0.625**2) / 3)  # of 1, 1, 1/2, 0
    assert found["standard_error"] == pytest.approx(100 * spread / 2)
    low, high = found["win_rate_ci"]
    assert low < 62.5 < high
    assert [found[name] for name in ("wins", "ties", "losses", "prompts")] == [2, 1, 1, 4]
    assert (found["mean_length"], found["baseline_mean_length"]) == (2.5, 1.5)
    assert found["length_controlled"] is None, "four rows are too few for its cross-validation"


def test_an_answer_that_could_not_be_judged_counts_in_no_rate() -> None:
    found = head_to_head([1.0, math.nan, 0.0, 1.0], ["aa"] * 4, ["a"] * 4)
    assert (found["prompts"], found["unjudged"]) == (3, 1)
    assert found["win_rate"] == pytest.approx(200 / 3)
    with pytest.raises(PrefoptError, match="found no judgement among 2"):
        head_to_head([math.nan] * 2, ["a"] * 2, ["a"] * 2)


def test_answers_to_one_prompt_are_averaged_first() -> None:
    found = head_to_head([1.0, 1.0, 1.0, 0.0], ["a"] * 4, ["b"] * 4, groups=["p", "p", "p", "q"])
    assert (found["win_rate"], found["prompts"], found["wins"]) == (50.0, 2, 1)


def test_one_prompt_has_no_standard_error() -> None:
    assert head_to_head([1.0], ["a"], ["b"])["standard_error"] is None


def test_the_corrected_rate_comes_with_an_interval_of_the_fit() -> None:
    lengths = [5 + 3 * k for k in range(40)]
    a, b = ["x" * n for n in lengths], ["x" * (n % 60) for n in lengths]
    values = [1 / (1 + math.exp(-(len(x) - len(y)) / 20)) for x, y in zip(a, b, strict=True)]
    found = head_to_head(values, a, b)
    corrected = found["length_controlled"]
    low, high = corrected["win_rate_ci"]
    assert low < corrected["win_rate"] < high
    assert abs(corrected["win_rate"] - 50) < abs(found["win_rate"] - 50) - 10, "all is length"
    assert corrected["standard_error"] == pytest.approx((high - low) / 3.92, rel=1e-3)
    assert "no instruction difficulty" in corrected["approximation"]


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(PrefoptError, match="found 1 preferences for 2 and 1 answers"):
        head_to_head([1.0], ["a", "b"], ["a"])
