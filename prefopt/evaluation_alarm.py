"""When training gains in the eyes of its own judge what a held-out judge does not see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm

from prefopt.eval.win_rate import FloatArray

LEVEL = 0.05  # of a false alarm in a whole run, and of the rise that has to go with a fall
LEAST = 0.02  # of the win rate: what a policy may waver from one evaluation to the next
RADEMACHER = 1 / (4 * norm.sf(math.sqrt(2)))  # 3.18

NOT_WATCHED = (
    "over-optimisation is not watched: %s; give eval.judge a judge that training does not ask, "
    "such as a reward model trained on other pairs, or an API"
)
WHAT_TO_TRY = (
    "Use a checkpoint of that time, if one was kept, or try fewer rounds, a lower learning_rate, a "
    "higher beta, a length_penalty where answers grow, or a judge of training that is harder to "
    "please"
)


class Judged(NamedTuple):
    """An evaluation as two judges saw it.

    Attributes:
        after: Rounds before it.
        held_out: P(the policy's answer beats the baseline's) [prompts] in [0, 1] of a judge that
            training does not ask, NaN where unjudged.
        training: The same of the judge that training asks.
    """

    after: int
    held_out: FloatArray
    training: FloatArray


@dataclass(frozen=True)
class Watch:
    """What two judges say of the last evaluation and of an earlier one, on the same prompts.

    Attributes:
        since: Rounds before the earlier one.
        held_out: Win rate (0-100) by the held-out judge, then and now.
        p_fall: One-sided, of the hypothesis that the held-out judge's has not fallen by more than
            two points.
        training: Win rate by the judge of training, then and now.
        p_rise: One-sided, of the hypothesis that the judge of training's has not risen.
        level: What ``p_fall`` is held against.
    """

    since: int
    held_out: tuple[float, float]
    p_fall: float
    training: tuple[float, float]
    p_rise: float
    level: float

    @property
    def alarming(self) -> bool:
        """Whether the held-out judge's has fallen while the judge of training's has risen."""
        return self.p_fall < self.level and self.p_rise < LEVEL


def watch(evaluations: Sequence[Judged], planned: int) -> Watch | None:
    """Compares the last evaluation with those before it.

    A run of n evaluations and its start compares up to n (n + 1) / 2 pairs; a fall counts at the
    level 0.05 over that number. So in a run in which the held-out judge's win rate never truly
    falls by more than two points the chance of any alarm is at most 5 %, however often one looks
    (Bonferroni). Without the two points many prompts would tell how a policy wavers. The rise
    that has to go with it says what kind of fall it is, and counts at 0.05.

    Args:
        evaluations: In order, the start first.
        planned: Evaluations in the whole run, the start not counted.

    Returns:
        The comparison with the earlier evaluation that the held-out judge liked best, among the
        alarming ones if there are any; None where there is nothing to compare.
    """
    *earlier, now = evaluations
    planned = max(planned, len(earlier))
    level = LEVEL / (planned * (planned + 1) / 2) if planned else LEVEL
    found = [each for one in earlier if (each := _compare(one, now, level)) is not None]
    return max(found, key=lambda each: (each.alarming, each.held_out[0]), default=None)


def _compare(then: Judged, now: Judged, level: float) -> Watch | None:
    columns = np.stack([then.held_out, now.held_out, then.training, now.training])
    columns = columns[:, ~np.isnan(columns).any(axis=0)]
    if not columns.size:
        return None
    held_out_then, held_out_now, training_then, training_now = columns
    rates = [100 * float(column.mean()) for column in columns]
    return Watch(
        since=then.after,
        held_out=(rates[0], rates[1]),
        p_fall=p_greater(held_out_then - held_out_now - LEAST),
        training=(rates[2], rates[3]),
        p_rise=p_greater(training_now - training_then),
        level=level,
    )


def p_greater(difference: FloatArray) -> float:
    """One-sided p-value of the paired sign-flip test that a mean difference is not above 0.

    With random signs a sum of differences over the root of their sum of squares exceeds z with a
    probability of at most 3.18 P(N(0, 1) > z), the best such constant for any number of
    differences of any sizes (Bentkus and Dzindzalieta 2015, Bernoulli 21(2), arXiv:1112.1314). So
    the p-value is never too small under the test's hypothesis, nor limited by a number of
    resamples, and needs at least 10 differences to fall below 0.003.

    Args:
        difference: By prompt, [prompts].
    """
    size = math.sqrt(float(np.square(difference).sum()))
    if size == 0:
        return 1.0
    return min(1.0, RADEMACHER * float(norm.sf(difference.sum() / size)))


def alarm_message(found: Watch, then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """The alarm in words.

    Args:
        found: An alarming comparison.
        then: The earlier evaluation's result; None: the policy's start, whose answers are the
            baseline.
        now: The last one's.
    """
    unit, since, after = now["unit"], found.since, now["after"]
    best = f"{unit} {since}" if since else "the start"
    length = now["baseline_mean_length"] if then is None else then["mean_length"]
    moved = [f"answers from {length:.0f} to {now['mean_length']:.0f} characters"]
    kl = 0.0 if then is None else then.get("kl")
    if kl is not None and now.get("kl") is not None:
        moved.append(f"KL from {kl:.2f} to {now['kl']:.2f} nats")
    return (
        f"over-optimisation: from {best} to {unit} {after} the win rate rose from "
        f"{found.training[0]:.1f} to {found.training[1]:.1f} (p = {found.p_rise:.1g}) by the judge "
        f"that training asks, and fell from {found.held_out[0]:.1f} to {found.held_out[1]:.1f} "
        f"(p = {found.p_fall:.1g}, alarm below {found.level:.1g}) by the held-out judge; meanwhile "
        f"{' and '.join(moved)}. The policy of {best} was better"
    )
