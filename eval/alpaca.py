"""``prefopt eval alpaca``: AlpacaEval 2 with any judge, in alpaca_eval's own formats.

Formats and formulas: https://github.com/tatsu-lab/alpaca_eval, and Dubois et al. 2024,
arXiv:2404.04475, for length control.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.errors import DataError, PrefoptError
from prefopt.eval.answers import (
    Answer,
    Answers,
    answers_of,
    instruction_of,
    is_answers_file,
    model_name,
    read_answers,
    write_model_outputs,
)
from prefopt.eval.judging import judge_of, judge_pairs
from prefopt.eval.leaderboard import Annotations, leaderboard, read_annotations, write_leaderboard
from prefopt.eval.length_control import bootstrap_length_controlled, length_controlled_win_rate
from prefopt.eval.paired import paired_comparison
from prefopt.reward_models.api_judge import ApiJudge
from prefopt.rounds.storage import atomic_write
from prefopt.run_folder import environment

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """A model's answers beside the baseline's.

    Attributes:
        index: Place of each instruction in the baseline's file, from 0.
        model: The model's answers.
        baseline: The baseline's answers to the same instructions.
    """

    index: list[int]
    model: list[Answer]
    baseline: list[Answer]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers, judges, and writes what alpaca_eval writes, and ``result.json``.

    Raises:
        PrefoptError: A file, the model or the judge is not what it should be.
    """
    reference = read_answers(arguments.baseline)
    reference = Answers(reference.name, reference.rows[: arguments.limit])
    found = is_answers_file(arguments.model) and read_answers(arguments.model)
    name = arguments.name or (found.name if found else model_name(arguments.model))
    folder = Path(arguments.out or f"runs/alpaca/{name.replace('/', '--')}")
    answers = found or answers_of(
        arguments.model,
        [row.prompt for row in reference.rows],
        arguments,
        folder / "answers.jsonl",
        name,
    )
    pairs = pair_up(answers, reference, arguments.limit)
    judge, record = judge_of(arguments, folder)
    preferences = judge_pairs(
        judge,
        record,
        [row.prompt for row in pairs.baseline],
        [row.text for row in pairs.model],
        [row.text for row in pairs.baseline],
        folder / "preferences.jsonl",
    )
    named = Answers(name, pairs.model, answers.decoding)
    write_model_outputs(folder / "model_outputs.json", named)
    write_annotations(folder / "annotations.json", pairs, preferences, name, reference.name, record)
    result = _measures(folder / "annotations.json", pairs.index, arguments)
    if isinstance(judge, ApiJudge):
        result["usage"] = asdict(judge.api.usage)
    result |= {
        "model": name,
        "baseline": reference.name,
        "missing": len(reference.rows) - len(pairs.index),
        "judge": record,
        "decoding": answers.decoding,
        "files": {
            option: _file_hash(path)
            for option in ("baseline", "difficulty", "gamed")
            if (path := getattr(arguments, option))
        },
        "environment": environment(),
        "out": str(folder),
    }
    atomic_write(folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def pair_up(model: Answers, baseline: Answers, limit: int | None = None) -> Pairs:
    """Puts a model's answers beside the baseline's, in the baseline's order.

    Instructions that the model has not answered are left out, and said.

    Raises:
        PrefoptError: The model answers what the baseline does not, or nothing of it.
    """
    ours, theirs = model.by_key(), baseline.by_key()
    unknown = [] if limit else [key for key in ours if key not in theirs]
    index = [i for i, row in enumerate(baseline.rows) if row.key in ours]
    if unknown or not index:
        raise PrefoptError(
            f"{model.name}: {len(unknown) or len(ours)} of {len(ours)} answers are to instructions "
            f"that the baseline's file does not have, the first {next(iter(unknown or ours))[0]:.80}"
            "; expected answers to the same instructions, word for word"
        )
    if missing := len(baseline.rows) - len(index):
        logger.warning("%s answers %d of %d instructions", model.name, len(index), len(theirs))
        logger.warning("the %d others are left out of all numbers", missing)
    return Pairs(
        index,
        [ours[baseline.rows[i].key] for i in index],
        [baseline.rows[i] for i in index],
    )


def write_annotations(
    path: Path,
    pairs: Pairs,
    preferences: np.ndarray,
    model: str,
    baseline: str,
    judge: dict[str, Any],
) -> None:
    """Writes alpaca_eval's ``annotations.json``.

    Args:
        path: The file.
        pairs: The answers.
        preferences: Shape [pairs], P(model beats baseline); NaN, which JSON lacks, becomes null.
            The file has them as alpaca_eval does, in [1, 2]: 2 says that the model is better.
        model: The model's name, ``generator_2``.
        baseline: The baseline's name, ``generator_1``.
        judge: Its record.
    """
    date = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [
        {
            "dataset": theirs.dataset,
            "instruction": instruction_of(theirs.prompt),
            "output_1": theirs.text,
            "generator_1": baseline,
            "output_2": ours.text,
            "generator_2": model,
            "annotator": str(judge.get("model") or judge["path"]),
            "preference": None if math.isnan(value) else 1 + value,
            "date": date,
        }
        for ours, theirs, value in zip(
            pairs.model, pairs.baseline, preferences.tolist(), strict=True
        )
    ]
    atomic_write(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
