"""MT-Bench's arithmetic: ratings and pairwise verdicts to scores with intervals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt.eval.win_rate import win_rate

FAILED = -1.0
ROUNDS = 1000
QUANTILES = (0.025, 0.975)

_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_RATINGS = (re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]"))
_WINNER = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)


@dataclass(frozen=True)
class Mark:
    """What the judge has said of one turn.

    Attributes:
        question: The question's id.
        category: Its category.
        turn: 1 or 2.
        value: A rating from 1 to 10, or of a comparison 1 for a win, 1/2 for a tie and 0 for a
            loss; None where the judge could not be understood.
    """

    question: int | str
    category: str
    turn: int
    value: float | None


def parse_rating(text: str) -> float:
    """The last number in double brackets, or else the last one in single brackets.

    Returns:
        A rating from 1 to 10; -1 where there is none, or one outside this range.
    """
    for pattern in _RATINGS:
        if found := pattern.findall(text):
            rating = float(found[-1])
            return rating if 1 <= rating <= 10 else FAILED
    return FAILED


def parse_winner(text: str) -> str | None:
    """The last of [[A]], [[B]] and [[C]] (a tie); None without one."""
    found = _WINNER.findall(text)
    return found[-1].upper() if found else None


def preference(model_first: str | None, baseline_first: str | None) -> float | None:
    """1 where the model wins both games, 0 where it loses both, else a tie, 1/2.

    Args:
        model_first: The winner where the model is A.
        baseline_first: The winner where the model is B.

    Returns:
        None where one of the games has no winner.
    """
    if model_first is None or baseline_first is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((model_first, baseline_first), 0.5)


def rating_scores(marks: Sequence[Mark], seed: int) -> dict[str, Any]:
    """Means over all ratings of a model, over those of each turn and of each category.

    Returns:
        For each part ``score`` (1-10), ``ci``, the 2.5 to 97.5 % of a bootstrap over questions,
        ``ratings`` that count and ``failed`` ones. Both are None where none counts.
    """
    return _by_part(marks, lambda part: _rating_score(part, seed))


def comparison_scores(marks: Sequence[Mark]) -> dict[str, Any]:
    """Adjusted win rates over all comparisons of a model, those of each turn and category.

    Returns:
        For each part ``wins``, ``ties`` and ``losses``, ``win_rate`` and ``loss_rate`` of all that
        count, ``win_rate_adjusted``, (wins + ties / 2) / n, all in 0-100, its 95 % interval ``ci``
        (that of `win_rate`, the turns of a question averaged first) and ``failed`` comparisons.
        Rates are None where none counts.
    """
    return _by_part(marks, _comparison_score)


def _by_part(marks: Sequence[Mark], summary: Any) -> dict[str, Any]:
    turns = sorted({mark.turn for mark in marks})
    categories = dict.fromkeys(mark.category for mark in marks)
    return {
        "all": summary(marks),
        "turns": {str(turn): summary([m for m in marks if m.turn == turn]) for turn in turns},
        "categories": {
            name: summary([mark for mark in marks if mark.category == name]) for name in categories
        },
    }


def _rating_score(marks: Sequence[Mark], seed: int) -> dict[str, Any]:
    good = [(str(mark.question), mark.value) for mark in marks if mark.value is not None]
    row: dict[str, Any] = {"score": None, "ci": None}
    if good:
        values = np.array([value for _, value in good])
        questions, place = np.unique([question for question, _ in good], return_inverse=True)
        totals, counts = np.bincount(place, weights=values), np.bincount(place)
        # sorted, so that the order of the questions changes nothing, nor do their names
        order = np.lexsort((counts, totals))
        share = np.full(len(questions), 1 / len(questions))
        drawn = np.random.default_rng(seed).multinomial(len(questions), share, size=ROUNDS)
        means = (drawn @ totals[order]) / (drawn @ counts[order])
        low, high = np.quantile(means, QUANTILES)
        row = {"score": float(values.mean()), "ci": [float(low), float(high)]}
    return row | {"ratings": len(good), "failed": len(marks) - len(good)}


def _comparison_score(marks: Sequence[Mark]) -> dict[str, Any]:
    good = [(mark.question, mark.value) for mark in marks if mark.value is not None]
    values = [value for _, value in good]
    n, wins, losses = len(values), values.count(1.0), values.count(0.0)
    row: dict[str, Any] = dict.fromkeys(("win_rate", "loss_rate", "win_rate_adjusted", "ci"))
    if good:
        row = {
            "win_rate": 100 * wins / n,
            "loss_rate": 100 * losses / n,
            "win_rate_adjusted": 100 * sum(values) / n,
            "ci": list(win_rate(values, [question for question, _ in good]).ci),
        }
    counts = {"wins": wins, "ties": n - wins - losses, "losses": losses}
    return row | counts | {"failed": len(marks) - n}
