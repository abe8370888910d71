"""A fall of the win rate ends training if it is large and no noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prefopt.evaluation_stop import reason_to_stop

HALF = np.full(40, 0.5)


def evaluation(after: int, preferences: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    rate = 100 * float(np.nanmean(preferences))
    return {"after": after, "unit": "round", "win_rate": rate}, preferences


def test_the_best_so_far_is_what_counts() -> None:
    found = [evaluation(n, HALF + rise) for n, rise in enumerate((0, 0.2, 0.15, 0.08))]
    assert reason_to_stop(found[:1], 5) is None
    assert reason_to_stop(found[:3], 10) is None
    reason = reason_to_stop(found, 10)
    assert reason is not None
    assert reason.startswith(
        "after round 3 the win rate is 58.0; on the same prompts it was 12.0 points higher after "
        "round 1 (p = "
    )
    assert reason_to_stop(found, 12.1) is None


def test_a_fall_of_two_prompts_may_be_noise() -> None:
    fallen = np.where(np.arange(40) < 2, 0.0, 0.9)
    assert reason_to_stop([evaluation(0, HALF + 0.4), evaluation(1, fallen)], 4) is None


@pytest.mark.parametrize("shared", [0, 20])
def test_prompts_that_were_not_judged_twice_say_nothing(shared: int) -> None:
    before, now = HALF + 0.4, HALF - 0.4
    before[20 + shared :] = np.nan
    now[:20] = np.nan
    reason = reason_to_stop([evaluation(0, before), evaluation(1, now)], 5)
    assert (reason is None) == (shared == 0)
