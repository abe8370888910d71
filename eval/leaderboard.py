"""A leaderboard of many models against one baseline, in alpaca_eval's format."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy.typing as npt

from prefopt.errors import DataError, PrefoptError
from prefopt.eval.annotations import Annotations
from prefopt.eval.length_control import length_controlled_win_rate
from prefopt.eval.length_design import Gamed, read_gamed
from prefopt.eval.numbers import csv_cell
from prefopt.rounds.storage import atomic_write

INDEX_NAMES = ("", "model", "name")  # headings of the column that names the model


@dataclass(frozen=True)
class LeaderboardRow:
    """One line of a ``leaderboard.csv``; all but `model` carry the names of its columns.

    Attributes:
        model: The line's index.
        win_rate: In 0-100.
        standard_error: In 0-100; None for a single judged row.
        n_wins: Preferences above 1.5.
        n_wins_base: Preferences below 1.5.
        n_draws: Preferences of exactly 1.5.
        n_total: Judged rows.
        discrete_win_rate: In 0-100, a tie counting one half.
        mode: alpaca_eval's word for where the line comes from.
        avg_length: Mean characters of the model's answers, rounded down.
        length_controlled_winrate: In 0-100; None on lines that never had one.
        lc_standard_error: In 0-100; None on lines that never had one.
    """

    model: str
    win_rate: float
    standard_error: float | None
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_total: int
    discrete_win_rate: float
    mode: str
    avg_length: int
    length_controlled_winrate: float | None
    lc_standard_error: float | None


COLUMNS = tuple(field.name for field in fields(LeaderboardRow))
COUNTS = ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length")
MAY_LACK = ("standard_error", "length_controlled_winrate", "lc_standard_error")


def leaderboard(
    models: Mapping[str, Annotations],
    *,
    instruction_difficulty: Mapping[str, npt.ArrayLike] | None = None,
    gamed: Gamed | None = None,
    C: float | None = None,  # noqa: N803
    mode: str = "community",
) -> list[LeaderboardRow]:
    """Rates every model; the best length-controlled win rate comes first.

    Args:
        models: The judgements of each model.
        instruction_difficulty: For each model, shape [rows] aligned with its judgements.
        gamed: As for `length_controlled_win_rate`, which has the definitions.
        C: As there; None: cross-validated for each model.
        mode: What `LeaderboardRow.mode` says.

    Raises:
        PrefoptError: The rows of a model cannot be rated; the message begins with its name.
        DataError: A gamed row or column that cannot be used.
    """
    if isinstance(gamed, (str, os.PathLike)):
        gamed = read_gamed(gamed)
    if instruction_difficulty is not None and not models.keys() <= instruction_difficulty.keys():
        missing = sorted(models.keys() - instruction_difficulty.keys())
        raise PrefoptError(f"no instruction_difficulty for {missing[0]!r}: give it for all models")
    rows = []
    for name, judged in models.items():
        difficulty = None if instruction_difficulty is None else instruction_difficulty[name]
        try:
            rate = length_controlled_win_rate(
                judged.preferences,
                judged.model_lengths,
                judged.baseline_lengths,
                instruction_difficulty=difficulty,
                gamed=gamed,
                C=C,
            )
        except DataError:
            raise
        except PrefoptError as error:
            raise PrefoptError(f"{name}: {error}") from error
        rows.append(
            LeaderboardRow(
                model=name,
                win_rate=rate.win_rate,
                standard_error=None if math.isnan(rate.standard_error) else rate.standard_error,
                n_wins=rate.n_wins,
                n_wins_base=rate.n_wins_base,
                n_draws=rate.n_draws,
                n_total=rate.n,
                discrete_win_rate=rate.discrete_win_rate,
                mode=mode,
                avg_length=int(judged.model_lengths.mean()),
                length_controlled_winrate=rate.lc_win_rate,
                lc_standard_error=(
                    None if math.isnan(rate.lc_standard_error) else rate.lc_standard_error
                ),
            )
        )
    return ranked(rows)


def ranked(rows: Iterable[LeaderboardRow]) -> list[LeaderboardRow]:
    """By length-controlled win rate, then by win rate, the best first; those without come last."""

    def key(row: LeaderboardRow) -> tuple[float, float, str]:
        controlled = row.length_controlled_winrate
        return (math.inf if controlled is None else -controlled, -row.win_rate, row.model)

    return sorted(rows, key=key)


def write_leaderboard(path: str | os.PathLike[str], rows: Iterable[LeaderboardRow]) -> None:
    """Writes a ``leaderboard.csv`` of alpaca_eval, ranked; numbers keep all their digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *COLUMNS[1:]])
    for row in ranked(rows):
        values = [getattr(row, column) for column in COLUMNS]
        writer.writerow(["" if value is None else csv_cell(value) for value in values])
    atomic_write(Path(path), text.getvalue())


def read_leaderboard(path: str | os.PathLike[str]) -> list[LeaderboardRow]:
    """Reads a ``leaderboard.csv`` of alpaca_eval, in the file's order; other columns are left.

    Raises:
        PrefoptError: The file cannot be read.
        DataError: A column that is absent, or a value that is no number.
    """
    where = os.fspath(path)
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lines, headings = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError) as error:
        raise PrefoptError(f"{where}: cannot be read as a CSV file: {error}") from error
    if not headings or headings[0] not in INDEX_NAMES:
        raise DataError(where, "model", f"the first heading is {headings[:1]}: expected the models")
    for column in COLUMNS[1:]:
        if column not in headings and column not in ("mode", *MAY_LACK):
            raise DataError(where, column, "no such column: expected alpaca_eval's leaderboard.csv")
    return [
        _parse(line, headings[0], f"{where}:{number}") for number, line in enumerate(lines, start=1)
    ]


def _parse(line: dict[str, str], index: str, place: str) -> LeaderboardRow:
    values: dict[str, object] = {"model": line[index], "mode": line.get("mode") or ""}
    for column in COLUMNS:
        if column in values:
            continue
        text = line.get(column) or ""
        if not text and column in MAY_LACK:
            values[column] = None
            continue
        try:
            number = float(text)
            values[column] = int(number) if column in COUNTS else number
        except (ValueError, OverflowError) as error:
            raise DataError(place, column, f"found {text!r}, expected a number") from error
    return LeaderboardRow(**values)  # type: ignore[arg-type]
