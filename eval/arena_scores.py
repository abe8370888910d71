"""Arena-Hard's arithmetic: verdicts to scores, intervals, and scores with style held fixed."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from prefopt.eval.bradley_terry import ELO, BradleyTerry, fit_bradley_terry
from prefopt.eval.style import FEATURES

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

STRONG = 3  # how often a strong verdict counts
LABELS = {"A>>B": [1.0] * STRONG, "A>B": [1.0], "A=B": [0.5], "B>A": [0.0], "B>>A": [0.0] * STRONG}
QUANTILES = (0.05, 0.95)
ANCHOR = 1000.0  # Elo points of the baseline
CONTROLS = {"length and markdown": [0, 1, 2, 3], "length": [0], "markdown": [1, 2, 3]}

_VERDICT = re.compile(r"\[\[\s*([AB])\s*(>>|<<|>|<|=)\s*([AB])\s*\]\]", re.IGNORECASE)


def parse_verdict(text: str) -> str | None:
    """The last of the five labels in a judge's answer; None without one.

    The last one counts because judges think aloud and quote answers before they decide. Labels the
    other way round, such as [[B<A]], are read as what they mean.
    """
    found = [match.groups() for match in _VERDICT.finditer(text.upper()) if match[1] != match[3]]
    if not found:
        return None
    left, sign, right = found[-1]
    if sign == "=":
        return "A=B"
    return f"{left}{sign}{right}" if ">" in sign else f"{right}{'>' * len(sign)}{left}"


def expanded_scores(baseline_first: str | None, model_first: str | None) -> list[float] | None:
    """The model's scores from the verdicts of both games; None where one has none.

    A strong verdict counts three times. The model is A in the second game and B in the first, which
    therefore contributes one minus its scores.
    """
    if baseline_first is None or model_first is None:
        return None
    return LABELS[model_first] + [1 - score for score in LABELS[baseline_first]]


@dataclass(frozen=True)
class Battle:
    """Both games of one model against the baseline on one question.

    Attributes:
        question: The question's id.
        category: Its category.
        model: The model's name.
        scores: The expanded scores in {0, 1/2, 1}; None where a verdict is missing.
        style: Shape [features], see `style_differences`.
    """

    question: int | str
    category: str
    model: str
    scores: list[float] | None
    style: FloatArray = field(default_factory=lambda: np.zeros(len(FEATURES)))


@dataclass(frozen=True)
class Cells:
    """Expanded scores counted by model, question and value, in an order of their own.

    Attributes:
        models: Shape [cells], number of the model.
        questions: Shape [cells], number of the question.
        scores: Shape [cells], 0, 1/2 or 1.
        counts: Shape [cells], how often the model has that score there.
        style: Shape [cells, features].
    """

    models: IntArray
    questions: IntArray
    scores: FloatArray
    counts: FloatArray
    style: FloatArray


def tabulate(battles: Sequence[Battle], models: Sequence[str]) -> Cells:
    """Counts the scores of those models' battles that have them, in whatever order they come."""
    questions = {id: n for n, id in enumerate(sorted({str(b.question) for b in battles}))}
    number = {name: n for n, name in enumerate(models)}
    counts: dict[tuple[int, int, float], int] = {}
    styles: dict[tuple[int, int], FloatArray] = {}
    for battle in battles:
        if battle.model in number and battle.scores is not None:
            place = number[battle.model], questions[str(battle.question)]
            styles[place] = battle.style
            for score in battle.scores:
                counts[*place, score] = counts.get((*place, score), 0) + 1
    keys = sorted(counts)
    return Cells(
        models=np.array([key[0] for key in keys], dtype=np.intp),
        questions=np.array([key[1] for key in keys], dtype=np.intp),
        scores=np.array([key[2] for key in keys]),
        counts=np.array([counts[key] for key in keys], dtype=np.float64),
        style=np.array([styles[key[:2]] for key in keys]),
    )


def resample(cells: Cells, by: str, rounds: int, seed: int) -> Iterator[FloatArray]:
    """Bootstrap weights of the cells, shape [cells], round after round.

    Args:
        cells: What is resampled.
        by: "rows" draws each model's expanded scores anew, as Arena-Hard does, and takes the two to
            six scores of a question for independent ones. "questions" draws questions, with all
            that was scored on them.
        rounds: How many.
        seed: Selects the draws.
    """
    rng = np.random.default_rng(seed)
    if by == "questions":
        numbers, place = np.unique(cells.questions, return_inverse=True)
        share = np.full(len(numbers), 1 / len(numbers))
        for _ in range(rounds):
            yield cells.counts * rng.multinomial(len(numbers), share)[place]
        return
    bounds = np.flatnonzero(np.diff(cells.models, prepend=-1, append=-1))
    parts = [cells.counts[start:end] for start, end in pairwise(bounds)]
    for _ in range(rounds):
        drawn = [rng.multinomial(int(part.sum()), part / part.sum()) for part in parts]
        yield np.concatenate(drawn).astype(np.float64)


def mean_scores(cells: Cells, weights: FloatArray, models: int) -> FloatArray:
    """Each model's weighted mean score, shape [models], in [0, 1]; NaN without any."""
    with np.errstate(invalid="ignore"):
        total = np.bincount(cells.models, weights=weights * cells.scores, minlength=models)
        mean: FloatArray = total / np.bincount(cells.models, weights=weights, minlength=models)
    return mean


def score_table(battles: Sequence[Battle], rounds: int, seed: int) -> list[dict[str, Any]]:
    """Scores of the models, best first; scores and intervals are in 0-100.

    Returns:
        One row a model: ``model``; ``score``, the mean over bootstrap rounds over expanded scores,
        which is the number that Arena-Hard shows, and ``rows_interval`` of the same rounds;
        ``mean``, the plain mean; ``questions_interval`` of rounds over questions; ``elo`` of the
        Bradley-Terry fit with the baseline at 1000, and ``elo_interval`` of rounds over questions;
        infinite ratings, as of a model that wins everything, are None. ``questions`` that count and
        ``dropped`` ones, in which a verdict is missing. Intervals are 5 to 95 %. A model without
        any question that counts comes last and has the last two only.
    """
    models = played(battles)
    judged = Counter(battle.model for battle in battles)
    dropped = Counter(battle.model for battle in battles if battle.scores is None)
    table = _scores(battles, models, rounds, seed) if models else []
    table += [{"model": name} for name in judged if name not in models]
    for row in table:
        name = row["model"]
        row |= {"questions": judged[name] - dropped[name], "dropped": dropped[name]}
    return table


def played(battles: Sequence[Battle]) -> list[str]:
    """The models with at least one question that counts, in order of their names."""
    return sorted({battle.model for battle in battles if battle.scores is not None})


def _scores(
    battles: Sequence[Battle], models: Sequence[str], rounds: int, seed: int
) -> list[dict[str, Any]]:
    cells = tabulate(battles, models)
    rows, questions = (
        np.array([mean_scores(cells, w, len(models)) for w in resample(cells, by, rounds, seed)])
        for by in ("rows", "questions")
    )
    mean = mean_scores(cells, cells.counts, len(models))
    elo = _fit(cells, cells.counts, len(models)).elo(ANCHOR)[1:]
    table: list[dict[str, Any]] = []
    for n, model in enumerate(models):
        interval = _interval(questions[:, n])
        table.append(
            {
                "model": model,
                "score": 100 * float(rows[:, n].mean()),
                "rows_interval": _interval(100 * rows[:, n]),
                "mean": 100 * float(mean[n]),
                "questions_interval": [100 * rate for rate in interval],
                "elo": _finite(elo[n]),
                "elo_interval": [_elo_of(rate) for rate in interval],
            }
        )
    return sorted(table, key=lambda row: -row["mean"])


def style_table(
    battles: Sequence[Battle], columns: Sequence[int], rounds: int, seed: int
) -> dict[str, Any]:
    """Scores that the models would have if their answers had the baseline's style.

    One logistic regression over all battles, score ~ sigmoid(strength of the model + slopes times
    style differences), without intercept or penalty; the baseline's strength is 0. ``score`` is
    sigmoid(strength), at no difference in style. Arena-Hard centres the differences first, so that
    its score is at the mean difference over all battles, the model's own style in part: a single
    model's would hardly move. That number stands beside it as ``score_at_mean_style``.

    Args:
        battles: Of all models; at least one with scores.
        columns: Which of `FEATURES` are controlled for.
        rounds: Bootstrap rounds.
        seed: Selects the draws.

    Returns:
        ``slopes``: feature -> change in strength for one standard deviation of its difference,
        with a ``questions_interval``; both None where the feature does not vary or decides all
        battles.
        ``models``: one row a model, best first, with both scores and for each its
        ``rows_interval`` and ``questions_interval`` (5 to 95 %), in 0-100, and ``elo``. Models
        without a question that counts are left out.
    """
    models = played(battles)
    cells = tabulate(battles, models)
    features = _in_deviations(cells, columns)
    centre = np.average(features, axis=0, weights=cells.counts)
    point = _fit(cells, cells.counts, len(models), features)
    drawn = {
        by: [
            _fit(cells, w, len(models), features, point) for w in resample(cells, by, rounds, seed)
        ]
        for by in ("rows", "questions")
    }
    rows: list[dict[str, Any]] = [
        {"model": model, "elo": _finite(elo)}
        for model, elo in zip(models, point.elo(ANCHOR)[1:], strict=True)
    ]
    for name, at in (("score", 0 * centre), ("score_at_mean_style", centre)):
        scores = _scores_at([point], at)[0]
        intervals = {f"{by}_interval": _scores_at(fits, at) for by, fits in drawn.items()}
        for n, row in enumerate(rows):
            row[name] = float(scores[n])
            row[f"{name}_intervals"] = {by: _interval(part[:, n]) for by, part in intervals.items()}
    slopes: dict[str, Any] = {
        FEATURES[column]: {
            "slope": float(point.slopes[k]),
            "questions_interval": _interval([fit.slopes[k] for fit in drawn["questions"]]),
        }
        if point.slopes_determined[k]
        else {"slope": None, "questions_interval": None}
        for k, column in enumerate(columns)
    }
    return {"slopes": slopes, "models": sorted(rows, key=lambda row: -row["score"])}


def _in_deviations(cells: Cells, columns: Sequence[int]) -> FloatArray:
    """Style differences in standard deviations over all scores; 0 where they do not vary."""
    chosen = cells.style[:, list(columns)]
    mean = np.average(chosen, axis=0, weights=cells.counts)
    spread = np.sqrt(np.average((chosen - mean) ** 2, axis=0, weights=cells.counts))
    features: FloatArray = np.divide(
        chosen, spread, out=np.zeros_like(chosen), where=spread > 1e-12
    )
    return features


def _scores_at(fits: Sequence[BradleyTerry], at: FloatArray) -> FloatArray:
    """Scores at a difference in style, shape [fits, models]; NaN where a model was not drawn."""
    scores = [
        np.where(np.isnan(fit.elo()), np.nan, expit(fit.strengths + at @ fit.slopes))
        for fit in fits
    ]
    return 100 * np.array(scores)[:, 1:]


def _fit(
    cells: Cells,
    weights: FloatArray,
    models: int,
    features: FloatArray | None = None,
    start: BradleyTerry | None = None,
) -> BradleyTerry:
    """The baseline is player 0, the models come after it."""
    return fit_bradley_terry(
        cells.models + 1,
        np.zeros_like(cells.models),
        cells.scores,
        models + 1,
        weights=weights,
        features=features,
        start=start,
    )


def _interval(values: Any) -> list[float]:
    return [float(value) for value in np.nanquantile(values, QUANTILES)]


def _elo_of(rate: float) -> float | None:
    return ANCHOR + ELO * math.log(rate / (1 - rate)) if 0 < rate < 1 else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
