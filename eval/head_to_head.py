"""One model against another on the same prompts: the numbers that every comparison reports."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from prefopt.errors import PrefoptError
from prefopt.eval.length_control import (
    bootstrap_length_controlled,
    length_controlled_win_rate,
)
from prefopt.eval.win_rate import Z95, FloatArray, win_rate


def head_to_head(
    preferences: Sequence[float] | FloatArray,
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    groups: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """What the judgements of two models' answers come to, as plain values for a JSON file.

    Args:
        preferences: Shape [answers], P(a beats b) in [0, 1]; NaN where the judge could not be
            understood. Such answers count in no rate.
        answers_a: Shape [answers], the model's.
        answers_b: Shape [answers], the baseline's.
        groups: The prompt of each answer, where prompts have several; see `win_rate`.

    Returns:
        ``win_rate``, ``win_rate_ci`` (low, high) and ``standard_error`` (None of one prompt) in
        0-100; ``wins``, ``ties``, ``losses`` and ``prompts``; ``unjudged``, the answers that are
        NaN; ``mean_length`` and ``baseline_mean_length`` of all answers, in characters; and
        ``length_controlled``, None where it cannot be fitted, with ``win_rate``, ``win_rate_ci``
        and ``approximation``. Its interval is the bootstrap's, with the fit in it, and its
        ``standard_error`` what that interval's width is for a normal: without difficulties
        AlpacaEval's own standard error is 0 by construction.

    Raises:
        PrefoptError: Nothing was judged, a preference is outside [0, 1], or lengths differ.
    """
    values = np.asarray(preferences, dtype=np.float64)
    if not len(values) == len(answers_a) == len(answers_b):
        raise PrefoptError(
            f"found {len(values)} preferences for {len(answers_a)} and {len(answers_b)} answers: "
            "expected equal numbers"
        )
    judged = np.flatnonzero(~np.isnan(values))
    if not len(judged):
        raise PrefoptError(
            f"found no judgement among {len(values)} preferences, expected some that are not NaN; "
            "look at what the judge answers"
        )
    rate = win_rate(values[judged], None if groups is None else [groups[i] for i in judged])
    lengths = [np.array([len(text) for text in side]) for side in (answers_a, answers_b)]
    return {
        "win_rate": rate.win_rate,
        "win_rate_ci": list(rate.ci),
        # of one prompt there is no standard error, and JSON knows no NaN
        "standard_error": None if math.isnan(rate.standard_error) else rate.standard_error,
        "wins": rate.wins,
        "ties": rate.ties,
        "losses": rate.losses,
        "prompts": rate.n,
        "unjudged": len(values) - len(judged),
        "mean_length": float(lengths[0].mean()),
        "baseline_mean_length": float(lengths[1].mean()),
        "length_controlled": _length_controlled(values[judged], *(n[judged] for n in lengths)),
    }


def _length_controlled(
    preferences: FloatArray, lengths: np.ndarray, baseline_lengths: np.ndarray
) -> dict[str, Any] | None:
    rows = (preferences + 1, lengths, baseline_lengths)
    try:
        fit = length_controlled_win_rate(*rows)
        low, high = bootstrap_length_controlled(*rows, C=fit.C).lc_win_rate
    except PrefoptError:  # fewer prompts than its cross-validation has folds
        return None
    return {
        "win_rate": fit.lc_win_rate,
        "win_rate_ci": [low, high],
        "standard_error": (high - low) / (2 * Z95),
        "approximation": fit.approximation,
    }
