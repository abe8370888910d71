"""``prefopt eval leaderboard``: AlpacaEval's leaderboard from files of annotations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.data.rows import prompt_text
from prefopt.errors import PrefoptError
from prefopt.eval.annotations import (
    Annotations,
    difficulty_by_instruction,
    difficulty_by_position,
    read_annotations,
    read_difficulty,
    warn_of_judges,
)
from prefopt.eval.answers import read_answers
from prefopt.eval.leaderboard import leaderboard, write_leaderboard


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates the model of every file and writes ``leaderboard.csv``.

    Raises:
        PrefoptError: A file is not what it should be, two are of one model, or of two baselines.
    """
    models: dict[str, Annotations] = {}
    for path in arguments.annotations:
        judged = read_annotations(path)
        if judged.model in models:
            raise PrefoptError(f"{path}: a second file of {judged.model!r}; give one a model")
        models[judged.model] = judged
    baselines = {judged.baseline for judged in models.values()}
    if len(baselines) > 1:
        raise PrefoptError(
            f"found judgements against {', '.join(sorted(baselines))}, expected one baseline: win "
            "rates over different baselines cannot be ranked"
        )
    warn_of_judges(models.values())
    reference = None
    if arguments.baseline:
        answers = read_answers(arguments.baseline)
        reference = [prompt_text(row.prompt) for row in answers.rows]
    difficulties = {
        name: difficulty
        for name, judged in models.items()
        if (difficulty := difficulty_of(arguments, judged.instructions, reference)) is not None
    }
    rows = leaderboard(
        models,
        instruction_difficulty=difficulties or None,
        gamed=arguments.gamed,
        C=arguments.C,
    )
    write_leaderboard(Path(arguments.out), rows)
    return {"rows": [asdict(row) for row in rows], "out": arguments.out}


def difficulty_of(
    arguments: argparse.Namespace, instructions: Sequence[str], reference: Sequence[str] | None
) -> np.ndarray | None:
    """The difficulty of each row as the command's options say; None without a file.

    Args:
        arguments: With ``difficulty`` (a CSV file or None) and ``difficulty_by_position``.
        instructions: The instruction of each row.
        reference: The instructions in the order of the difficulties.

    Raises:
        PrefoptError: The file is not of these instructions, or their order is not known.
    """
    if arguments.difficulty is None:
        if arguments.difficulty_by_position:
            raise PrefoptError("--difficulty-by-position: expected a file with --difficulty")
        return None
    values = read_difficulty(arguments.difficulty)
    if arguments.difficulty_by_position:
        return difficulty_by_position(values, len(instructions))
    if reference is None:
        raise PrefoptError(
            "--difficulty: which instruction has which difficulty is known by the order of the "
            "reference set: expected its model_outputs.json with --baseline, or "
            "--difficulty-by-position for files that are complete and in that order"
        )
    return difficulty_by_instruction(values, reference, instructions)


def print_result(result: dict[str, Any]) -> None:
    """The leaderboard as a table."""
    table = Table("model", "LC win rate", "s.e.", "win rate", "s.e.", "length", "n")
    keys = ("length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error")
    for row in result["rows"]:
        numbers = ["–" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        table.add_row(row["model"], *numbers, str(row["avg_length"]), str(row["n_total"]))
    Console(markup=False).print(table)
    print(f"written to {result['out']}")
