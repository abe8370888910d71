"""Win rates with confidence intervals over instructions, and the calibration of a judge."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from prefopt.errors import PrefoptError

FloatArray = npt.NDArray[np.float64]
Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class WinRate:
    """How often a model beats its baseline; rates, error and interval are in 0-100.

    Attributes:
        win_rate: Mean preference, a tie counting one half.
        standard_error: Sample standard deviation (ddof 1) over sqrt(n), as in AlpacaEval 2;
            NaN when n is 1. It is 0 when all preferences are equal: quote `ci` instead.
        ci: 95 % interval (low, high), see `win_rate`.
        wins: Instructions with a (mean) preference above 1/2.
        ties: Instructions with a (mean) preference of 1/2.
        losses: Instructions with a (mean) preference below 1/2.
        n: Number of instructions.
    """

    win_rate: float
    standard_error: float
    ci: tuple[float, float]
    wins: int
    ties: int
    losses: int
    n: int


@dataclass(frozen=True)
class Calibration:
    """How far stated confidence agrees with accuracy; everything is a fraction in [0, 1].

    Attributes:
        accuracy: Share of pairs whose better answer was named.
        ece: Expected calibration error.
        table: One row per non-empty bin, in order of confidence: the mean `confidence`, the
            `accuracy` and the `count` of its pairs.
    """

    accuracy: float
    ece: float
    table: list[dict[str, float]]


def win_rate(
    preferences: Sequence[float] | FloatArray, groups: Sequence[Hashable] | None = None
) -> WinRate:
    """Averages P(model beats baseline) and says how sure the average is.

    The interval is Wilson's score interval (1927, JASA 22:209), which holds its level for few
    instructions and for one-sided results, at an effective sample size n / d. The dispersion d is
    the variance of the preferences relative to that of wins and losses with the same mean,
    v / (m (1 - m)), estimated after adding one win and one loss. For wins and losses d = 1 and the
    interval is exactly Wilson's; ties and soft preferences narrow it as far as they vary less;
    it has positive width whatever the preferences are.

    Args:
        preferences: Shape [samples], each in [0, 1]: 1 a win, 1/2 a tie, 0 a loss, or soft.
        groups: The instruction each sample belongs to. Samples of one instruction are averaged
            first, so that n counts instructions and repeated sampling does not feign precision.

    Raises:
        PrefoptError: No preferences, a value outside [0, 1], or lengths that differ.
    """
    values = _probabilities(preferences, "preferences")
    if groups is not None:
        values = _group_means(values, groups)
    n = len(values)
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    low, high = wilson_interval(mean, n / _dispersion(values))
    ties = int(np.isclose(values, 0.5, rtol=0, atol=1e-9).sum())
    wins = int((values > 0.5 + 1e-9).sum())
    return WinRate(
        win_rate=100 * mean,
        standard_error=100 * error,
        ci=(100 * low, 100 * high),
        wins=wins,
        ties=ties,
        losses=n - wins - ties,
        n=n,
    )


def wilson_interval(rate: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a rate in [0, 1] seen on n (effective) trials."""
    centre = (rate + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = math.sqrt(rate * (1 - rate) / n + (Z95 / (2 * n)) ** 2) * Z95 / (1 + Z95**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration(
    p: Sequence[float] | FloatArray, outcome: Sequence[float] | FloatArray, bins: int = 10
) -> Calibration:
    """Expected calibration error of a judge (Guo et al. 2017, arXiv:1706.04599, eq. 3).

    A pair's confidence is max(p, 1 - p), and the judge is right when the answer it favours is the
    better one, so the order in which the two answers are named never matters: p may always be
    P(chosen beats rejected) with an outcome of 1. Bins are of equal width over [0.5, 1].

    Args:
        p: Shape [pairs], P(first answer beats second).
        outcome: Shape [pairs], 1 when the first answer is better, 0 when the second is, 1/2 for
            a tie, or the share of votes for the first.
        bins: Number of bins.

    Raises:
        PrefoptError: No pairs, a value outside [0, 1], or lengths that differ.
    """
    confidence, correct = _confidence_and_correct(p, outcome)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    table: list[dict[str, float]] = []
    for b in np.unique(index):
        inside = index == b
        table.append(
            {
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(correct[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    gaps = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table)
    return Calibration(float(correct.mean()), gaps / len(correct), table)


def accuracy_by(
    p: Sequence[float] | FloatArray,
    outcome: Sequence[float] | FloatArray,
    groups: Sequence[Hashable],
) -> list[dict[str, object]]:
    """Accuracy of a judge per group of pairs, for instance per bucket of length.

    Args:
        p: Shape [pairs], P(first answer beats second).
        outcome: Shape [pairs], as for `calibration`.
        groups: Shape [pairs], the group of each pair.

    Returns:
        One row per group, in order of first appearance: `group`, `accuracy`, the 95 % interval
        `low` and `high` (fractions, as for `win_rate`) and `count`.

    Raises:
        PrefoptError: No pairs, a value outside [0, 1], or lengths that differ.
    """
    _, correct = _confidence_and_correct(p, outcome)
    names, index = _group_index(groups, len(correct))
    rows: list[dict[str, object]] = []
    for g, name in enumerate(names):
        rate = win_rate(correct[index == g])
        low, high = (bound / 100 for bound in rate.ci)
        accuracy = rate.win_rate / 100
        rows.append(
            {"group": name, "accuracy": accuracy, "low": low, "high": high, "count": rate.n}
        )
    return rows


def _confidence_and_correct(
    p: Sequence[float] | FloatArray, outcome: Sequence[float] | FloatArray
) -> tuple[FloatArray, FloatArray]:
    predicted, observed = _probabilities(p, "p"), _probabilities(outcome, "outcome")
    if len(predicted) != len(observed):
        raise PrefoptError(
            f"p has {len(predicted)} values and outcome has {len(observed)}: expected equal lengths"
        )
    favoured = np.where(predicted > 0.5, observed, 1 - observed)
    return np.maximum(predicted, 1 - predicted), np.where(predicted == 0.5, 0.5, favoured)


def _dispersion(values: FloatArray) -> float:
    """Variance relative to wins and losses of the same mean, with one win and one loss added."""
    padded = np.append(values, (0.0, 1.0))
    mean = padded.mean()
    return float(padded.var() / (mean * (1 - mean)))


def _group_means(values: FloatArray, groups: Sequence[Hashable]) -> FloatArray:
    _, index = _group_index(groups, len(values))
    means: FloatArray = np.bincount(index, weights=values) / np.bincount(index)
    return means


def _group_index(
    groups: Sequence[Hashable], length: int
) -> tuple[list[Hashable], npt.NDArray[np.intp]]:
    if len(groups) != length:
        raise PrefoptError(f"groups has {len(groups)} entries for {length} values: give one each")
    first: dict[Hashable, int] = {}
    index = [first.setdefault(group, len(first)) for group in groups]
    return list(first), np.asarray(index, dtype=np.intp)


def _probabilities(values: Sequence[float] | FloatArray, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise PrefoptError(
            f"{name} has shape {array.shape}: expected one or more numbers in a list"
        )
    # Written so that NaN, which compares false with everything, is refused as well.
    bad = np.flatnonzero(~((array >= 0) & (array <= 1)))
    if bad.size:
        raise PrefoptError(
            f"{name}[{bad[0]}] is {array[bad[0]]}: expected a number in [0, 1] "
            f"({bad.size} of {array.size} values are outside; drop failed judgements first)"
        )
    return array
