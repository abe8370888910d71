"""Bradley-Terry strengths from battles, with covariates, soft outcomes and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from prefopt.errors import PrefoptError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

ELO = 400 / math.log(10)  # Elo points of one unit of strength
# Of the log-likelihood: a parameter that the battles determine moves by less than 1e-5 for it, one
# that they drive to infinity or say nothing of stays finite.
RIDGE = 1e-6
# Standard error, in units of strength, from which on a parameter counts as not determined. Under
# RIDGE one that is driven to infinity has an error of about 200, one without any battle of 1000; a
# single lost point in thousands of battles gives about 1.
UNDETERMINED = 30.0
MAX_STEPS = 100


@dataclass(frozen=True)
class BradleyTerry:
    """Strengths s and slopes w of logit P(first beats second) = s_first - s_second + x w.

    Attributes:
        strengths: Shape [models], in nats; the baseline's is 0.
        slopes: Shape [features].
        determined: Shape [models]; False where no finite strength fits best, as for a model that
            has won or lost everything, or has not played. Its strength is then large (18 and more)
            or 0, and only its sign means something.
        slopes_determined: Shape [features], likewise.
    """

    strengths: FloatArray
    slopes: FloatArray
    determined: npt.NDArray[np.bool_]
    slopes_determined: npt.NDArray[np.bool_]

    def elo(self, anchor: float = 1000.0) -> FloatArray:
        """Elo ratings, shape [models]; the baseline has ``anchor``, 400 points are odds of 10 to 1.

        Infinite where no finite strength fits best, NaN for a model that has not played.
        """
        limit = np.where(self.strengths == 0, np.nan, np.copysign(np.inf, self.strengths))
        return anchor + ELO * np.where(self.determined, self.strengths, limit)

    def win_rates(self) -> FloatArray:
        """P(model beats the baseline) at equal covariates, shape [models], in [0, 1]."""
        rates: FloatArray = expit(self.strengths)
        return rates


def fit_bradley_terry(
    first: Any,
    second: Any,
    outcomes: Any,
    models: int,
    *,
    baseline: int = 0,
    weights: Any = None,
    features: Any = None,
    start: BradleyTerry | None = None,
) -> BradleyTerry:
    """Maximum likelihood fit of Bradley and Terry (1952, Biometrika 39:324) with covariates.

    A logistic regression without an intercept. The strengths of a model that wins everything have
    no finite maximum, so the log-likelihood is penalised by half of `RIDGE` times the sum of
    squares, which is too little to move a parameter that the battles determine;
    ``determined`` of the result says which ones they do.

    Args:
        first: Shape [battles], the number of the first model of each battle.
        second: Shape [battles], that of the second.
        outcomes: Shape [battles], in [0, 1]: 1 where the first has won, 1/2 a tie, or soft.
        models: How many there are.
        baseline: The model whose strength is 0.
        weights: Shape [battles], how often each battle counts; default: once.
        features: Shape [battles, features], covariates of the first minus those of the second, of
            about unit scale.
        start: A fit to begin from, to save time.

    Raises:
        PrefoptError: No battles, or arrays that do not fit each other or their ranges.
    """
    y, w, x = _arrays(outcomes, weights, features)
    n = len(y)
    one, two = (_players(part, n, models) for part in (first, second))
    counts = w > 0
    one, two, y, w, x = one[counts], two[counts], y[counts], w[counts], x[counts]
    rows = np.arange(len(y))
    strengths = np.zeros((len(y), models))
    strengths[rows, one] += 1
    strengths[rows, two] -= 1
    free = np.delete(np.arange(models), baseline)
    design = np.concatenate([strengths[:, free], x], axis=1)
    beta = np.zeros(design.shape[1])
    if start is not None:
        beta = np.concatenate([start.strengths[free], start.slopes])
    beta, hessian = _newton(design, y, w, beta)
    determined = np.sqrt(np.diag(np.linalg.inv(hessian))) < UNDETERMINED
    count = len(free)
    return BradleyTerry(
        np.insert(beta[:count], baseline, 0.0),
        beta[count:],
        np.insert(determined[:count], baseline, True),
        determined[count:],
    )


def _newton(
    design: FloatArray, y: FloatArray, w: FloatArray, beta: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Newton's method with step halving; returns the minimum and the Hessian there."""

    def loss(at: FloatArray) -> float:
        z = design @ at
        return float(w @ (np.logaddexp(0, z) - y * z) + RIDGE / 2 * at @ at)

    ridge = RIDGE * np.eye(len(beta))
    value = loss(beta)
    for _ in range(MAX_STEPS):
        p = expit(design @ beta)
        hessian = design.T @ (design * (w * p * (1 - p))[:, None]) + ridge
        step = np.linalg.solve(hessian, design.T @ (w * (y - p)) - RIDGE * beta)
        while (new := loss(beta + step)) > value * (1 + 1e-12) + 1e-12:
            step = step / 2
        beta, value = beta + step, new
        if np.abs(step).max(initial=0) < 1e-6:  # its square is what is left
            return beta, hessian
    raise PrefoptError(
        f"Bradley-Terry: no convergence in {MAX_STEPS} steps; bring the features to unit scale"
    )


def _arrays(
    outcomes: Any, weights: Any, features: Any
) -> tuple[FloatArray, FloatArray, FloatArray]:
    y = np.asarray(outcomes, dtype=np.float64)
    n = y.size
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    x = np.zeros((n, 0)) if features is None else np.asarray(features, dtype=np.float64)
    if y.shape != (n,) or n == 0 or w.shape != (n,) or x.ndim != 2 or len(x) != n:
        raise PrefoptError(
            f"Bradley-Terry: found outcomes of shape {y.shape}, weights of {w.shape} and features "
            f"of {x.shape}; expected [battles], [battles] and [battles, features] with one battle "
            "or more"
        )
    if not ((y >= 0) & (y <= 1)).all():
        raise PrefoptError("Bradley-Terry: found an outcome outside [0, 1]; drop failed battles")
    if not (np.isfinite(w) & (w >= 0)).all() or not np.isfinite(x).all():
        raise PrefoptError(
            "Bradley-Terry: found a weight that is negative or not finite, or a feature that is "
            "not finite"
        )
    return y, w, x


def _players(numbers: Any, n: int, models: int) -> IntArray:
    players = np.asarray(numbers, dtype=np.intp)
    if players.shape != (n,) or players.min() < 0 or players.max() >= models:
        raise PrefoptError(
            f"Bradley-Terry: found players of shape {players.shape}, expected {n} numbers from 0 "
            f"to {models - 1}"
        )
    return players
