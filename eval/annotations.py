"""Reads alpaca_eval's judgements (annotations.json) and difficulties of instructions."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prefopt.errors import DataError, PrefoptError

logger = logging.getLogger(__name__)
FloatArray = npt.NDArray[np.float64]

TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2")


@dataclass(frozen=True)
class Annotations:
    """Judgements of one model against one baseline, row by row.

    Attributes:
        model: Name of the model, ``generator_2``.
        baseline: Name of the baseline, ``generator_1``.
        instructions: What was asked, [rows].
        preferences: Shape [rows], as stored: in [1, 2], 1 the baseline and 2 the model; NaN where
            the judge's answer could not be read.
        model_lengths: Shape [rows], characters.
        baseline_lengths: Shape [rows], characters.
        annotator: The judge, where the file names one, and one only.
    """

    model: str
    baseline: str
    instructions: list[str]
    preferences: FloatArray
    model_lengths: FloatArray
    baseline_lengths: FloatArray
    annotator: str | None = None


def read_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Reads an ``annotations.json`` of alpaca_eval: one list with an object for each row.

    Args:
        path: The file. Needed of each object are ``instruction``, ``output_1`` and
            ``generator_1`` (the baseline), ``output_2`` and ``generator_2`` (the model), and
            ``preference`` (a number or null); ``annotator`` is read where there is one, and more
            fields are allowed.

    Raises:
        PrefoptError: The file cannot be read or holds no such list.
        DataError: A row lacks a field, has one of another type, or is of other models.
    """
    rows = _read_json(path)
    where = os.fspath(path)
    names: tuple[str, str] | None = None
    preferences: list[float] = []
    for number, row in enumerate(rows, start=1):
        place = f"{where}:{number}"
        if not isinstance(row, dict):
            raise DataError(place, "instruction", f"the row is {row!r:.40}: expected an object")
        for field in TEXTS:
            if not isinstance(row.get(field), str):
                raise DataError(place, field, f"found {row.get(field)!r:.40}, expected a string")
        preferences.append(_preference(row, place))
        names = names or (row["generator_1"], row["generator_2"])
        if names != (row["generator_1"], row["generator_2"]):
            raise DataError(
                place,
                "generator_2",
                f"{row['generator_2']!r} against {row['generator_1']!r}, expected {names[1]!r} "
                f"against {names[0]!r} as in row 1: one file for each model and baseline",
            )
    if names is None:
        raise PrefoptError(f"{where}: no rows: expected one or more judgements")
    annotators = {str(row.get("annotator") or "") for row in rows}
    return Annotations(
        model=names[1],
        baseline=names[0],
        instructions=[row["instruction"] for row in rows],
        preferences=np.array(preferences),
        model_lengths=np.array([len(row["output_2"]) for row in rows], dtype=np.float64),
        baseline_lengths=np.array([len(row["output_1"]) for row in rows], dtype=np.float64),
        annotator=(annotators.pop() or None) if len(annotators) == 1 else None,
    )


def warn_of_judges(annotations: Iterable[Annotations]) -> None:
    """Says so where models that are compared were judged by different judges."""
    judges = sorted({judged.annotator for judged in annotations if judged.annotator})
    if len(judges) > 1:
        logger.warning("the judges differ (%s): so may what they like", ", ".join(judges))


def read_difficulty(path: str | os.PathLike[str]) -> FloatArray:
    """Reads difficulties of instructions, in the order of the reference set.

    Args:
        path: A CSV file with a column ``instruction_difficulty``, and perhaps ``index``, which
            then counts 0, 1, 2, ...

    Returns:
        Shape [instructions].

    Raises:
        PrefoptError: The file cannot be read.
        DataError: A column that is absent, or a value that cannot be.
    """
    where, column = os.fspath(path), "instruction_difficulty"
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PrefoptError(f"{where}: cannot be read as a CSV file: {error}") from error
    if not rows or column not in rows[0]:
        raise DataError(where, column, "no such column, or no rows")
    values = []
    for i, row in enumerate(rows):
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}:{i + 1}", column, f"found {row[column]!r}, expected a number")
        if row.get("index", str(i)) != str(i):
            raise DataError(f"{where}:{i + 1}", "index", f"found {row['index']!r}, expected {i}")
        values.append(value)
    return np.array(values)


def difficulty_by_instruction(
    difficulty: npt.ArrayLike, reference: Sequence[str], instructions: Sequence[str]
) -> FloatArray:
    """Looks up the difficulty of each row by its instruction: the right way.

    Args:
        difficulty: Shape [reference], as `read_difficulty` gives it.
        reference: The instructions of the reference set, in its order.
        instructions: The instruction of each row.

    Returns:
        Shape [rows].

    Raises:
        PrefoptError: `reference` is of another length, or an instruction is not in it.
    """
    values = np.asarray(difficulty, dtype=np.float64)
    if len(values) != len(reference):
        raise PrefoptError(
            f"{len(values)} difficulties for {len(reference)} reference instructions: expected "
            "one each"
        )
    places = {instruction: i for i, instruction in enumerate(reference)}
    unknown = [text for text in instructions if text not in places]
    if unknown:
        raise PrefoptError(
            f"{len(unknown)} of {len(instructions)} instructions have no known difficulty, the "
            f"first is {unknown[0]!r:.60}: leave the difficulty out for other instructions"
        )
    return values[[places[text] for text in instructions]]


def difficulty_by_position(difficulty: npt.ArrayLike, rows: int) -> FloatArray:
    """Looks up the difficulty of each row by its number, as the published leaderboard did.

    alpaca_eval renumbers the rows of a model before it looks difficulties up. Where a model lacks
    an instruction, all rows after it get the difficulty of an earlier instruction, and the
    published values hold that. It is the same as `difficulty_by_instruction` for a complete
    file in the reference set's order. Use it to reproduce published values, for nothing else.

    Args:
        difficulty: Shape [instructions], as `read_difficulty` gives it.
        rows: Rows of the model's file, in the file's order.

    Returns:
        Shape [rows].

    Raises:
        PrefoptError: More rows than difficulties.
    """
    values = np.asarray(difficulty, dtype=np.float64)
    if rows > len(values):
        raise PrefoptError(f"{rows} rows for {len(values)} difficulties: expected no more rows")
    return values[:rows]


def _preference(row: dict[str, Any], place: str) -> float:
    if "preference" not in row:
        raise DataError(place, "preference", "no such field: expected a number, or null")
    value = row["preference"]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(place, "preference", f"found {value!r:.40}, expected a number, or null")
    try:
        return float(value)
    except OverflowError:
        raise DataError(place, "preference", f"found {value!r:.40}, expected 1 to 2") from None


def _read_json(path: str | os.PathLike[str]) -> list[Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise PrefoptError(f"{os.fspath(path)}: cannot be read as JSON: {error}") from error
    if not isinstance(content, list):
        raise PrefoptError(
            f"{os.fspath(path)}: holds a {type(content).__name__}: expected one list of objects"
        )
    return content
