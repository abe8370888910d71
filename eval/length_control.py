"""Win rate, discrete win rate and length-controlled win rate, as AlpacaEval 2 defines them.

Sources: Dubois et al. 2024, "Length-Controlled AlpacaEval", arXiv:2404.04475, and the repository
tatsu-lab/alpaca_eval, whose metrics carry the names ``get_winrate`` and ``length_controlled_v1``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefopt.errors import PrefoptError
from prefopt.eval.l1_logistic import fit_l1_logistic, log_loss, sigmoid
from prefopt.eval.length_design import (
    GAMED_WEIGHT,
    NO_DIFFICULTY,
    NO_GAMED_ROWS,
    NO_LENGTH_SPREAD,
    Gamed,
    Rows,
    finite,
    gamed_rows,
    scaled,
)

FloatArray = npt.NDArray[np.float64]

FOLDS = 5
GRID = np.logspace(-4, 4, 10)  # of C


class Weights(NamedTuple):
    """Coefficients of logit P(model beats baseline); 0 for a term that was left out.

    Attributes:
        length: Of tanh((baseline length - model length) / s): negative where the judge likes
            long answers.
        difficulty: Of the instruction's difficulty.
        model: What the model is better by on an instruction of difficulty 0 at equal lengths.
    """

    length: float
    difficulty: float
    model: float


@dataclass(frozen=True)
class LengthControlledWinRate:
    """All that AlpacaEval 2 says of a model; rates and standard errors are in 0-100.

    Attributes:
        win_rate: Mean preference of the judged rows.
        standard_error: Sample standard deviation over sqrt(n); NaN for one row.
        lc_win_rate: Mean predicted rate were both answers of the same length.
        lc_standard_error: Spread of those predictions over the instructions, over sqrt(rows).
            It leaves out the uncertainty of the fit: `bootstrap_length_controlled` has that.
        discrete_win_rate: Rate of wins, a tie counting one half.
        weights: The fit's coefficients.
        C: Inverse strength of the L1 penalty; None where nothing was fitted (see `weights`).
        approximation: Which parts of the definition were missing, or an empty string.
        warning: What is doubtful about the corrected rate, or an empty string.
        n: Judged rows.
        n_wins: Judged rows with a preference above 1.5.
        n_wins_base: Judged rows with a preference below 1.5.
        n_draws: Judged rows with a preference of exactly 1.5.
        unjudged: Rows that count in no rate but the predicted one: NaN or outside [1, 2].
    """

    win_rate: float
    standard_error: float
    lc_win_rate: float
    lc_standard_error: float
    discrete_win_rate: float
    weights: Weights
    C: float | None
    approximation: str
    warning: str
    n: int
    n_wins: int
    n_wins_base: int
    n_draws: int
    unjudged: int


@dataclass(frozen=True)
class BootstrapIntervals:
    """95 % percentile intervals (low, high) in 0-100, and how they were made."""

    win_rate: tuple[float, float]
    lc_win_rate: tuple[float, float]
    C: float | None
    samples: int


def length_controlled_win_rate(
    preferences: npt.ArrayLike,
    model_lengths: npt.ArrayLike,
    baseline_lengths: npt.ArrayLike,
    *,
    instruction_difficulty: npt.ArrayLike | None = None,
    gamed: Gamed | None = None,
    C: float | None = None,  # noqa: N803
) -> LengthControlledWinRate:
    """Rates a model against its baseline, with and without the judge's taste for length.

    A logistic regression with soft labels, fitted to this model's rows,

        logit P(model beats baseline) = length * tanh((baseline - model length) / s)
                                        + difficulty * difficulty_i + model,

    with s the sample standard deviation of the difference in length over all rows, gives the
    length-controlled rate: the mean prediction with the first term at 0. The fit minimises
    |w|_1 + C * sum of weighted log losses. The gamed rows, the baseline's own longer and shorter
    variants, take part with weight 0.1 each and without the model term. A model that gives the
    baseline's answers (only ties, and equal lengths everywhere) has 50 by definition.

    The order of rows changes nothing: folds of the cross-validation are dealt out in turn to the
    rows in order of preference.

    Args:
        preferences: Shape [rows], in [1, 2] as alpaca_eval stores them: 1 the baseline surely
            wins, 2 the model does; 1.5 a tie, for which 0 is the old code. Rows that are NaN or
            outside are left out of the win rate and of the fit, and are predicted.
        model_lengths: Shape [rows], characters of the model's answer.
        baseline_lengths: Shape [rows], characters of the baseline's answer.
        instruction_difficulty: Shape [rows], of each row's instruction.
        gamed: Columns ``std_delta_len``, ``preference`` or ``preference_reconstructed`` (in
            [0, 1]: P(variant beats baseline); rows without one are left out), and
            ``instruction_difficulty`` where difficulty is used; a CSV file or a table (a pandas
            DataFrame, or a dictionary of columns).
        C: Inverse penalty. None: of 10 values from 1e-4 to 1e4 the one with the least weighted
            log loss in 5-fold cross-validation.

    Raises:
        PrefoptError: Shapes that differ, values that cannot be, no judged row, or fewer than 5
            for the cross-validation.
        DataError: A gamed row or column that cannot be used.
    """
    rows = Rows.read(preferences, model_lengths, baseline_lengths, instruction_difficulty)
    y = rows.labels[rows.judged]
    raw, raw_error = _mean_and_error(y)
    weights, lc, lc_error, chosen, notes = Weights(0.0, 0.0, 0.0), 50.0, 0.0, None, ""
    if not rows.are_the_baseline:
        data = _Data.gather(rows, gamed)
        chosen = _choose(data, C)
        w = fit_l1_logistic(data.features, data.labels, chosen * data.weights[None])[0]
        lc, lc_error = _mean_and_error(sigmoid(rows.features()[:, 1:] @ w[1:]))
        slope = 0.0 if rows.difficulty is None else float(w[1])
        weights = Weights(float(w[0]), slope, float(w[-1]))
        notes = _approximation(rows, gamed)
    wins, draws = int((y > 0.5).sum()), int((y == 0.5).sum())
    return LengthControlledWinRate(
        win_rate=raw,
        standard_error=raw_error,
        lc_win_rate=lc,
        lc_standard_error=lc_error,
        discrete_win_rate=100 * (wins + draws / 2) / len(y),
        weights=weights,
        C=chosen,
        approximation=notes,
        warning=_warning(raw, lc),
        n=len(y),
        n_wins=wins,
        n_wins_base=len(y) - wins - draws,
        n_draws=draws,
        unjudged=len(rows.labels) - len(y),
    )


def length_controlled_against(
    model: Weights, baseline: Weights, instruction_difficulty: npt.ArrayLike | None = None
) -> float:
    """Length-controlled win rate of one rated model over another, in 0-100.

    Both were rated against the same baseline. The mean over instructions of
    sigmoid(model - model' + (difficulty - difficulty') d_i), so that the two directions add up to
    100 and a model has 50 against itself (Dubois et al. 2024, arXiv:2404.04475).

    Args:
        model: Weights of the model.
        baseline: Weights of the other model.
        instruction_difficulty: Shape [instructions]; None where the fits left it out.

    Raises:
        PrefoptError: Difficulty weights without difficulties, or difficulties that are no numbers.
    """
    bias, slope = model.model - baseline.model, model.difficulty - baseline.difficulty
    if instruction_difficulty is None:
        if slope != 0:
            raise PrefoptError(
                "the weights have a difficulty term: give the instruction_difficulty they "
                "were fitted with"
            )
        return 100 * float(sigmoid(np.array(bias)))
    difficulty = finite(instruction_difficulty, "instruction_difficulty")
    return 100 * float(sigmoid(bias + slope * difficulty).mean())


def bootstrap_length_controlled(
    preferences: npt.ArrayLike,
    model_lengths: npt.ArrayLike,
    baseline_lengths: npt.ArrayLike,
    *,
    instruction_difficulty: npt.ArrayLike | None = None,
    gamed: Gamed | None = None,
    C: float | None = None,  # noqa: N803
    samples: int = 1000,
    seed: int = 0,
) -> BootstrapIntervals:
    """Intervals that hold the uncertainty of the fit, by resampling instructions.

    Every resample draws as many of the model's rows as there are, with replacement, and goes
    through it all again: the spread of lengths, the fit, the mean prediction over the drawn rows.
    C is held, and so are the gamed rows: they and the difficulties belong to the definition of
    the measure, like the baseline. Percentile intervals (Efron 1979, Ann. Stat. 7:1). When all
    preferences are equal the interval of the win rate has no width: quote `win_rate`'s then.

    Args:
        preferences: As for `length_controlled_win_rate`, and so are lengths, difficulties and
            gamed rows.
        C: Inverse penalty; None: chosen by cross-validation once, on all rows.
        samples: Number of resamples.
        seed: Of the resampling.

    Raises:
        PrefoptError: As `length_controlled_win_rate`, or no samples.
        DataError: As there.
    """
    if samples < 1:
        raise PrefoptError(f"samples is {samples}: expected 1 or more resamples")
    rows = Rows.read(preferences, model_lengths, baseline_lengths, instruction_difficulty)
    if rows.are_the_baseline:
        return BootstrapIntervals((50.0, 50.0), (50.0, 50.0), None, samples)
    data = _Data.gather(rows, gamed)
    chosen = _choose(data, C)
    start = fit_l1_logistic(data.features, data.labels, chosen * data.weights[None])[0]
    n = len(rows.labels)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=samples)
    chunks = np.array_split(counts.astype(np.float64), math.ceil(samples / 100))
    rates = np.concatenate([_resampled(rows, data, chosen, start, chunk) for chunk in chunks])
    (low, lc_low), (high, lc_high) = np.nanquantile(rates, (0.025, 0.975), axis=0).tolist()
    return BootstrapIntervals((low, high), (lc_low, lc_high), chosen, samples)


@dataclass(frozen=True)
class _Data:
    """All rows of a fit, the judged ones first; `folds` numbers those of the cross-validation."""

    features: FloatArray  # [rows, terms]
    labels: FloatArray  # [rows]
    weights: FloatArray  # [rows]
    folds: npt.NDArray[np.intp]  # [rows]
    judged: int

    @classmethod
    def gather(cls, rows: Rows, gamed: Gamed | None) -> _Data:
        judged = rows.judged
        extra, extra_labels = gamed_rows(gamed, rows.difficulty is not None)
        n, m = int(judged.sum()), len(extra)
        return cls(
            np.concatenate([rows.features()[judged], extra]),
            np.concatenate([rows.labels[judged], extra_labels]),
            np.repeat((1.0, GAMED_WEIGHT), (n, m)),
            np.concatenate([np.arange(n), np.arange(m)]) % FOLDS,
            n,
        )


def _choose(data: _Data, given: float | None) -> float:
    """C as given, or the one with the least cross-validated log loss; of equals the smallest."""
    if given is not None:
        if not (given > 0 and math.isfinite(given)):
            raise PrefoptError(f"C is {given}: expected a number above 0, or None to choose it")
        return float(given)
    if data.judged < FOLDS:
        raise PrefoptError(
            f"{data.judged} judged rows are too few to choose C by {FOLDS}-fold "
            "cross-validation: give C"
        )
    held_out = data.weights * (data.folds == np.arange(FOLDS)[:, None])  # [folds, rows]
    training = GRID[:, None, None] * (data.weights - held_out)  # [C, folds, rows]
    w = fit_l1_logistic(data.features, data.labels, training.reshape(-1, len(data.labels)))
    losses = log_loss(w @ data.features.T, data.labels).reshape(training.shape)
    scores = (held_out * losses).sum(2) / held_out.sum(1)
    return float(GRID[scores.mean(1).argmin()])


def _resampled(
    rows: Rows, data: _Data, c: float, start: FloatArray, counts: FloatArray
) -> FloatArray:
    """Win rate and length-controlled rate [samples, 2] of rows drawn `counts` [samples, rows]."""
    judged, n = rows.judged, len(rows.labels)
    centred = rows.excess - (counts @ rows.excess / n)[:, None]
    spread = np.sqrt((counts * centred**2).sum(1) / (n - 1)) if n > 1 else np.zeros(len(counts))
    features = rows.features(scaled(rows.excess, spread[:, None]))  # [samples, rows, terms]
    extra = data.features[data.judged :]
    features_of_fit = np.concatenate(
        [features[:, judged], np.broadcast_to(extra, (len(counts), *extra.shape))], axis=1
    )
    drawn = np.ones((len(counts), len(data.labels)))
    drawn[:, : data.judged] = counts[:, judged]
    w = fit_l1_logistic(features_of_fit, data.labels, c * data.weights * drawn, start)
    predicted = sigmoid((features[:, :, 1:] @ w[:, 1:, None])[..., 0])
    votes = counts[:, judged].sum(1)
    votes[votes == 0] = np.nan  # a resample without a judged row says nothing
    raw = counts[:, judged] @ rows.labels[judged] / votes
    controlled = (counts * predicted).sum(1) / n + 0 * votes
    return 100 * np.stack([raw, controlled], axis=1)


def _mean_and_error(rates: FloatArray) -> tuple[float, float]:
    """In 0-100; the error is NaN for one value."""
    error = rates.std(ddof=1) / math.sqrt(len(rates)) if len(rates) > 1 else math.nan
    return 100 * float(rates.mean()), 100 * float(error)


def _approximation(rows: Rows, gamed: Gamed | None) -> str:
    notes = {
        NO_DIFFICULTY: rows.difficulty is None,
        NO_GAMED_ROWS: gamed is None,
        NO_LENGTH_SPREAD: rows.spread == 0,
    }
    return "; ".join(note for note, applies in notes.items() if applies)


def _warning(raw: float, controlled: float) -> str:
    """Says so when the correction is large: over 10 points, or 1/4 of the way to 0 or 100."""
    moved = controlled - raw
    room = 100 - raw if moved > 0 else raw
    if abs(moved) <= 10 and abs(moved) <= room / 4:
        return ""
    return (
        f"the length-controlled win rate of {controlled:.1f} is far from the win rate of "
        f"{raw:.1f}: read both, and look at the lengths and at some answers"
    )
