"""What the length-controlled fit is fitted to: judged rows, gamed rows, and their features."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from prefopt.errors import DataError, PrefoptError

FloatArray = npt.NDArray[np.float64]

GAMED_WEIGHT = 0.1  # of each gamed row: lambda = 0.2, shared by two rows an instruction
GAMED_LABELS = ("preference", "preference_reconstructed")  # columns; the first one there counts

NO_DIFFICULTY = (
    "no instruction difficulty was given, so its term is left out of the fit (this moves rates on "
    "the published leaderboard by up to 10 points where lengths differ much, and by up to 23 "
    "without gamed rows), and lc_standard_error is 0 by construction"
)
NO_GAMED_ROWS = (
    "no gamed baseline rows were given, so nothing ties the effect of length to that of longer "
    "and shorter answers of an equal model: quality that goes with length counts as length"
)
NO_LENGTH_SPREAD = (
    "the difference in length is the same in all rows, so its effect cannot be told from the "
    "model's and is left out: nothing is corrected for length"
)


class Table(Protocol):
    """Columns by name: a pandas DataFrame, or a dictionary of sequences."""

    def __contains__(self, column: object, /) -> bool: ...

    def __getitem__(self, column: Any, /) -> Any: ...


Gamed = Table | str | os.PathLike[str]


@dataclass(frozen=True)
class Rows:
    """The rows of one model, in an order that depends on their content alone.

    Attributes:
        labels: Shape [rows], P(model beats baseline), NaN where unjudged; ascending, NaN last.
        excess: Shape [rows], baseline length - model length.
        difficulty: Shape [rows], or None.
    """

    labels: FloatArray
    excess: FloatArray
    difficulty: FloatArray | None

    @classmethod
    def read(
        cls,
        preferences: npt.ArrayLike,
        model_lengths: npt.ArrayLike,
        baseline_lengths: npt.ArrayLike,
        instruction_difficulty: npt.ArrayLike | None,
    ) -> Self:
        """Checks the arguments of `length_controlled_win_rate`, which has their meaning.

        Raises:
            PrefoptError: Shapes that differ, values that cannot be, or no judged row.
        """
        labels = win_probabilities(preferences)
        own = _lengths(model_lengths, "model_lengths", len(labels))
        excess = _lengths(baseline_lengths, "baseline_lengths", len(labels)) - own
        difficulty = None
        if instruction_difficulty is not None:
            difficulty = _finite_rows(instruction_difficulty, "instruction_difficulty", len(labels))
        if np.isnan(labels).all():
            raise PrefoptError(
                f"none of {len(labels)} preferences is in [1, 2]: there is nothing to rate"
            )
        keys = (excess, labels) if difficulty is None else (difficulty, excess, labels)
        order = np.lexsort(keys)
        sorted_difficulty = None if difficulty is None else difficulty[order]
        return cls(labels[order], excess[order], sorted_difficulty)

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Shape [rows]."""
        return ~np.isnan(self.labels)

    @property
    def are_the_baseline(self) -> bool:
        """Whether these are the baseline's own answers: only ties, and equal lengths."""
        return bool((self.excess == 0).all() and (self.labels == 0.5).all())

    @cached_property
    def spread(self) -> float:
        """Sample standard deviation of the difference in length; 0 where it is always the same."""
        # Not by the deviation itself: that of equal numbers may be rounding error.
        return float(self.excess.std(ddof=1)) if np.ptp(self.excess) > 0 else 0.0

    def features(self, length: FloatArray | None = None) -> FloatArray:
        """The terms length, difficulty (where there is one) and model.

        Args:
            length: Shape [rows] or [problems, rows], the first term instead of this data's own.

        Returns:
            Shape [rows, terms] or [problems, rows, terms].
        """
        if length is None:
            length = scaled(self.excess, np.array(self.spread))
        columns = [length, np.ones_like(length)]
        if self.difficulty is not None:
            columns.insert(1, np.broadcast_to(self.difficulty, length.shape))
        return np.stack(columns, axis=-1)


def scaled(excess: FloatArray, spread: FloatArray) -> FloatArray:
    """tanh(excess / spread), and 0 where nothing spreads."""
    divisor = np.where(spread > 0, spread, np.inf)
    result: FloatArray = np.tanh(excess / divisor)
    return result


def gamed_rows(gamed: Gamed | None, with_difficulty: bool) -> tuple[FloatArray, FloatArray]:
    """Features [rows, terms] and labels [rows] of the gamed rows, in an order of their own.

    Rows without a preference (NaN, or an empty field) are left out, as upstream does.

    Args:
        gamed: As for `length_controlled_win_rate`.
        with_difficulty: Whether the fit has that term.

    Raises:
        DataError: A column that is absent or a value that cannot be.
    """
    if gamed is None:
        return np.empty((0, 2 + with_difficulty)), np.empty(0)
    where = "gamed"
    if isinstance(gamed, (str, os.PathLike)):
        where, gamed = os.fspath(gamed), read_gamed(gamed)
    label = next((column for column in GAMED_LABELS if column in gamed), None)
    if label is None:
        raise DataError(
            where,
            GAMED_LABELS[0],
            f"no such column, nor {GAMED_LABELS[1]!r}: expected P(variant beats baseline) in "
            "[0, 1]; rename yours",
        )
    labels = _column(
        gamed, label, where, "in [0, 1]", lambda v: np.isnan(v) | ((v >= 0) & (v <= 1))
    )
    length = np.tanh(_column(gamed, "std_delta_len", where, "that is finite", np.isfinite))
    columns = [length, np.zeros(len(length))]
    if with_difficulty:
        values = _column(gamed, "instruction_difficulty", where, "that is finite", np.isfinite)
        columns.insert(1, values)
    sizes = {len(values) for values in (labels, *columns)}
    if sizes == {0} or len(sizes) > 1:
        raise DataError(where, label, f"columns of {sorted(sizes)} rows: expected gamed rows")
    if "not_gamed_baseline" in gamed:
        flags = [str(flag).lower() for flag in np.asarray(gamed["not_gamed_baseline"]).tolist()]
        wrong = [i for i, flag in enumerate(flags) if flag not in ("false", "0", "0.0")]
        if wrong:
            raise DataError(
                f"{where}:{wrong[0] + 1}",
                "not_gamed_baseline",
                f"found {flags[wrong[0]]!r}, expected False: keep only rows of the baseline's "
                "own variants",
            )
    if np.isnan(labels).all():
        raise DataError(where, label, f"none of {len(labels)} rows was judged")
    order = np.lexsort((*columns, labels))[: np.count_nonzero(~np.isnan(labels))]  # NaN is last
    return np.stack(columns, axis=1)[order], labels[order]


def read_gamed(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reads a CSV file of gamed rows once, for the fits of many models.

    Raises:
        PrefoptError: The file cannot be read or holds no rows.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise PrefoptError(f"{os.fspath(path)}: cannot be read as a CSV file: {error}") from error
    if not rows:
        raise PrefoptError(f"{os.fspath(path)}: no rows: expected a heading and gamed rows")
    return {column: [row[column] or "" for row in rows] for column in rows[0] if column}


def win_probabilities(preferences: npt.ArrayLike) -> FloatArray:
    """P(model beats baseline) of preferences as alpaca_eval stores them.

    Args:
        preferences: Shape [rows], in [1, 2], 0 being the old code for a tie.

    Returns:
        Shape [rows], in [0, 1]; NaN where a preference is NaN or outside.

    Raises:
        PrefoptError: No rows, another shape, or probabilities in [0, 1] instead.
    """
    values = _numbers(preferences, "preferences")
    if values.size == 0:
        raise PrefoptError("there are no preferences: expected at least one row")
    known = values[~np.isnan(values)]
    if known.size and known.max() <= 1 and known.min() < 1:
        raise PrefoptError(
            f"the preferences lie in [{known.min():g}, {known.max():g}]: expected [1, 2] as "
            "alpaca_eval stores them, 1 for the baseline and 2 for the model; add 1 to "
            "probabilities, and write ties as 1.5"
        )
    labels = np.where(values == 0, 0.5, values - 1)
    return np.where((labels >= 0) & (labels <= 1), labels, np.nan)


def finite(values: npt.ArrayLike, name: str) -> FloatArray:
    """The values as an array [rows].

    Raises:
        PrefoptError: Another shape, or a value that is not finite.
    """
    array = _numbers(values, name)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise PrefoptError(f"{name}[{bad[0]}] is {array[bad[0]]}: expected a finite number")
    return array


def _lengths(values: npt.ArrayLike, name: str, rows: int) -> FloatArray:
    array = _finite_rows(values, name, rows)
    if (array < 0).any():
        raise PrefoptError(f"{name} has {array.min():g}: expected numbers of characters")
    return array


def _finite_rows(values: npt.ArrayLike, name: str, rows: int) -> FloatArray:
    array = finite(values, name)
    if len(array) != rows:
        raise PrefoptError(f"{name} has {len(array)} values for {rows} preferences: give one each")
    return array


def _numbers(values: npt.ArrayLike, name: str) -> FloatArray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PrefoptError(f"{name} holds what is no number: {error}") from error
    if array.ndim != 1:
        raise PrefoptError(f"{name} has shape {array.shape}: expected a list of numbers")
    return array


def _column(
    table: Table,
    name: str,
    where: str,
    expected: str,
    allowed: Callable[[FloatArray], npt.NDArray[np.bool_]],
) -> FloatArray:
    if name not in table:
        raise DataError(where, name, "no such column: it is needed for the gamed rows")
    values = np.asarray(table[name]).tolist()
    numbers = np.array([_number(value) for value in values])
    bad = np.flatnonzero(~allowed(numbers))
    if bad.size:
        raise DataError(
            f"{where}:{bad[0] + 1}", name, f"found {values[bad[0]]!r}, expected a number {expected}"
        )
    return numbers


def _number(value: object) -> float:
    """The value; NaN where there is none, and infinite where it is no number."""
    if value is None or value == "":
        return float("nan")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("inf")
