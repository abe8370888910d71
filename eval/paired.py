"""Two models on the same instructions: which one is better, and how surely."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from prefopt.errors import PrefoptError
from prefopt.eval.win_rate import win_rate

FloatArray = npt.NDArray[np.float64]
Preferences = Mapping[Hashable, float] | npt.ArrayLike


@dataclass(frozen=True)
class PairedComparison:
    """How far model a is ahead of model b, in points of win rate over their common baseline.

    Attributes:
        difference: Win rate of a minus win rate of b, in [-100, 100].
        ci: 95 % interval (low, high) of the difference.
        p_value: Two-sided, of the hypothesis that a and b are exchangeable.
        n: Instructions that both were judged on.
        dropped: Instructions that were judged for one of them only, or for neither.
    """

    difference: float
    ci: tuple[float, float]
    p_value: float
    n: int
    dropped: int


def paired_comparison(
    preferences_a: Preferences, preferences_b: Preferences, *, resamples: int = 9999, seed: int = 0
) -> PairedComparison:
    """Compares two models that were judged against the same baseline.

    The p-value is that of the sign-flip permutation test on the mean difference (Fisher 1935, The
    Design of Experiments, section 21): exact where there are at most `resamples` patterns of
    signs, otherwise from `resamples` random ones, with one added to both counts (Phipson and Smyth
    2010, arXiv:1603.05766). It needs neither normality nor equal variances, and is 1 when all
    differences are 0. The interval is that of `win_rate` on (1 + difference) / 2.

    Args:
        preferences_a: P(model a beats the baseline) in [0, 1], NaN where unjudged: shape
            [instructions], or by instruction. `win_probabilities` makes them of alpaca_eval's.
        preferences_b: The same of model b, in the same order or by the same instructions.
        resamples: Random patterns of signs.
        seed: Of the random patterns.

    Raises:
        PrefoptError: Lengths that differ, a value outside [0, 1], or nothing in common.
    """
    a, b = _aligned(preferences_a, preferences_b)
    judged = ~(np.isnan(a) | np.isnan(b))
    if not judged.any():
        raise PrefoptError(
            f"of {len(a)} instructions none was judged for both models: nothing can be compared"
        )
    difference = a[judged] - b[judged]
    low, high = win_rate((1 + difference) / 2).ci
    return PairedComparison(
        difference=100 * float(difference.mean()),
        ci=(2 * low - 100, 2 * high - 100),
        p_value=_sign_flip(difference, resamples, seed),
        n=len(difference),
        dropped=len(a) - len(difference),
    )


def _sign_flip(difference: FloatArray, resamples: int, seed: int) -> float:
    # Neither zeros nor the order of rows or models matter to the test: nor may they to the draws.
    moved = difference[difference != 0]
    moved = np.sort(moved if moved.sum() > 0 else -moved)
    if moved.size < 2:  # of one difference both signs are as far from 0
        return 1.0
    result = stats.permutation_test(
        (moved,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _aligned(a: Preferences, b: Preferences) -> tuple[FloatArray, FloatArray]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = list(dict.fromkeys([*a, *b]))
        a, b = ([side.get(key, np.nan) for key in keys] for side in (a, b))
    elif isinstance(a, Mapping) or isinstance(b, Mapping):
        raise PrefoptError("one model's preferences are by instruction: expected both to be")
    first, second = _probabilities(a, "preferences_a"), _probabilities(b, "preferences_b")
    if len(first) != len(second):
        raise PrefoptError(
            f"preferences_a has {len(first)} values and preferences_b {len(second)}: expected one "
            "each per instruction, NaN where unjudged"
        )
    return first, second


def _probabilities(values: npt.ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise PrefoptError(f"{name} has shape {array.shape}: expected a list of numbers")
    bad = np.flatnonzero((array < 0) | (array > 1))
    if bad.size:
        raise PrefoptError(
            f"{name}[{bad[0]}] is {array[bad[0]]}: expected a number in [0, 1] or NaN; "
            "win_probabilities() makes them of alpaca_eval's preferences in [1, 2]"
        )
    return array
