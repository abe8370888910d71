"""When evaluations say that training has done more harm than good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefopt.eval.paired import paired_comparison
from prefopt.eval.win_rate import FloatArray

NOISE = 0.05  # the p-value from which on a fall may be noise


def reason_to_stop(
    evaluations: Sequence[tuple[dict[str, Any], FloatArray]], limit: float
) -> str | None:
    """Why training is to end after the last of its evaluations; None where it goes on.

    Args:
        evaluations: In order, each with its ``after``, ``unit`` and ``win_rate`` (0-100) and its
            preferences [prompts] in [0, 1], NaN where unjudged.
        limit: Points below the best win rate so far from which on a fall counts, if the sign-flip
            test over the prompts that both were judged on says p < 0.05.
    """
    *earlier, (now, preferences) = evaluations
    if not earlier:
        return None
    best, its_preferences = max(earlier, key=lambda each: each[0]["win_rate"])
    if np.isnan(its_preferences + preferences).all():
        return None
    # by prompt, which leaves out how hard prompts are
    fall = paired_comparison(its_preferences, preferences)
    if fall.difference < limit or fall.p_value >= NOISE:
        return None
    unit = now["unit"]
    return (
        f"after {unit} {now['after']} the win rate is {now['win_rate']:.1f}; on the same prompts "
        f"it was {fall.difference:.1f} points higher after {unit} {best['after']} "
        f"(p = {fall.p_value:.2g}), and stop_on_drop is {limit:g}"
    )
