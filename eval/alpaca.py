"""``prefopt eval alpaca``: AlpacaEval 2 with any judge, in alpaca_eval's own formats.

Formats and formulas: https://github.com/tatsu-lab/alpaca_eval, and Dubois et al. 2024,
arXiv:2404.04475, for length control.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.data.rows import prompt_text
from prefopt.errors import PrefoptError
from prefopt.eval.annotations import Annotations, read_annotations, warn_of_judges
from prefopt.eval.answers import (
    Answer,
    Answers,
    answers_of,
    folder_name,
    is_answers_file,
    model_name,
    read_answers,
    write_model_outputs,
)
from prefopt.eval.judging import api_of, judge_of, judge_pairs, usage_line
from prefopt.eval.leaderboard import leaderboard, write_leaderboard
from prefopt.eval.leaderboard_command import difficulty_of
from prefopt.eval.length_control import bootstrap_length_controlled, length_controlled_win_rate
from prefopt.eval.length_design import gamed_rows, win_probabilities
from prefopt.eval.paired import paired_comparison
from prefopt.eval.win_rate import win_rate
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
    whole = read_answers(arguments.baseline)
    instructions = [prompt_text(row.prompt) for row in whole.rows]
    reference = Answers(whole.name, whole.rows[: arguments.limit])
    found = is_answers_file(arguments.model) and read_answers(arguments.model)
    name = arguments.name or (found.name if found else model_name(arguments.model))
    folder = Path(arguments.out or f"runs/alpaca/{folder_name(name)}")
    others = _prepare(arguments, folder, instructions, whole.name)
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
    result = _measures(folder, instructions, others, arguments)
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
            if (path := getattr(arguments, option)) is not None
        },
        "environment": environment(),
        "out": str(folder),
    }
    atomic_write(folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _prepare(
    arguments: argparse.Namespace, folder: Path, instructions: list[str], baseline: str
) -> dict[str, Annotations]:
    """The files of ``--compare``, read before this command writes its own.

    Raises:
        PrefoptError: One is against another baseline; or the API's options, or another file that
            the measures need, is wrong, which should end the command before anything is asked.
    """
    if arguments.judge_kind == "api":
        api_of(arguments, folder)
    difficulty = difficulty_of(arguments, instructions[: arguments.limit], instructions)
    gamed_rows(arguments.gamed, difficulty is not None)
    others = {path: read_annotations(path) for path in arguments.compare}
    for path, other in others.items():
        if other.baseline != baseline:
            raise PrefoptError(
                f"{path}: found the baseline {other.baseline!r}, expected {baseline!r}: win rates "
                "over different baselines cannot be compared"
            )
    return others


def pair_up(model: Answers, baseline: Answers, limit: int | None = None) -> Pairs:
    """Puts a model's answers beside the baseline's, in the baseline's order.

    An instruction as text and as one user's message are the same. Instructions that the model has
    not answered are left out, and said.

    Raises:
        PrefoptError: The model answers what the baseline does not, or nothing of it.
    """
    ours, theirs = ({_key(row): row for row in side.rows} for side in (model, baseline))
    index = [i for i, row in enumerate(baseline.rows) if _key(row) in ours]
    unknown = [key for key in ours if key not in theirs]
    if not index or (unknown and limit is None):
        raise PrefoptError(
            f"{model.name}: {len(unknown)} of {len(ours)} answers are to instructions that the "
            f"baseline's file does not have, the first {unknown[0][0]:.80}; expected answers to "
            "the same instructions, word for word"
        )
    if missing := len(baseline.rows) - len(index):
        logger.warning("%s answers %d of %d instructions", model.name, len(index), len(theirs))
        logger.warning("the %d others are left out of all numbers", missing)
    return Pairs(
        index,
        [ours[_key(baseline.rows[i])] for i in index],
        [baseline.rows[i] for i in index],
    )


def _key(row: Answer) -> tuple[str, int]:
    return prompt_text(row.prompt), row.sample


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
            "instruction": prompt_text(theirs.prompt),
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


def _measures(
    folder: Path,
    reference: list[str],
    others: dict[str, Annotations],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """All numbers of a folder's annotations, and its ``leaderboard.csv``."""
    judged = read_annotations(folder / "annotations.json")
    warn_of_judges([judged, *others.values()])
    difficulty = difficulty_of(arguments, judged.instructions, reference)
    given: dict[str, Any] = {"instruction_difficulty": difficulty, "gamed": arguments.gamed}
    columns = (judged.preferences, judged.model_lengths, judged.baseline_lengths)
    rate = length_controlled_win_rate(*columns, C=arguments.C, **given)
    given["C"] = rate.C
    write_leaderboard(
        folder / "leaderboard.csv",
        leaderboard(
            {judged.model: judged},
            instruction_difficulty=None if difficulty is None else {judged.model: difficulty},
            gamed=arguments.gamed,
            C=rate.C,
        ),
    )
    result = {
        **{key: _plain(value) for key, value in asdict(rate).items()},
        "weights": rate.weights._asdict(),
        "win_rate_ci": win_rate(_probabilities(judged)).ci,
        "mean_length": float(judged.model_lengths.mean()),
        "baseline_mean_length": float(judged.baseline_lengths.mean()),
        "difficulty_by_position": arguments.difficulty_by_position,
        "seed": arguments.seed,
    }
    if arguments.bootstrap:
        intervals = bootstrap_length_controlled(
            *columns, samples=arguments.bootstrap, seed=arguments.seed, **given
        )
        result["bootstrap"] = asdict(intervals)
    ours = _by_instruction(judged)
    result["compared_with"] = [
        {
            "model": other.model,
            "file": path,
            **asdict(paired_comparison(ours, _by_instruction(other))),
        }
        for path, other in others.items()
    ]
    return result


def _by_instruction(judged: Annotations) -> dict[Hashable, float]:
    return dict(
        zip(judged.instructions, win_probabilities(judged.preferences).tolist(), strict=True)
    )


def _probabilities(judged: Annotations) -> np.ndarray:
    values = win_probabilities(judged.preferences)
    return values[~np.isnan(values)]


def _plain(value: object) -> object:
    """Numbers as JSON knows them: of a single row there is no standard error."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _file_hash(path: str) -> dict[str, str]:
    return {"path": path, "sha256": sha256(Path(path).read_bytes()).hexdigest()}


def print_result(result: dict[str, Any]) -> None:
    """The rates with their intervals as a table, and what to know of them in words."""
    table = Table("measure", "%", "s.e.", "95 % interval")
    bootstrap = result.get("bootstrap", {})
    for label, key, error, interval in (
        ("length-controlled win rate", "lc_win_rate", "lc_standard_error", "lc_win_rate"),
        ("win rate", "win_rate", "standard_error", "win_rate"),
    ):
        low, high = bootstrap.get(interval) or (None, None)
        table.add_row(label, *map(_number, (result[key], result[error])), _interval(low, high))
    table.add_row("discrete win rate", _number(result["discrete_win_rate"]), "", "")
    Console(markup=False).print(table)
    print(
        f"{result['model']} against {result['baseline']}: {result['n_wins']} wins, "
        f"{result['n_draws']} draws, {result['n_wins_base']} losses; mean length "
        f"{result['mean_length']:.0f} against {result['baseline_mean_length']:.0f} characters"
    )
    for key, sentence in (
        ("unjudged", "{} answers of the judge could not be read and are left out of the win rate"),
        ("missing", "{} instructions are not answered and left out"),
        ("warning", "note: {}"),
    ):
        if result[key]:
            print(sentence.format(result[key]))
    for part in filter(None, result["approximation"].split("; ")):
        print(f"approximation: {part}")
    for row in result["compared_with"]:
        low, high = row["ci"]
        print(
            f"{row['difference']:+.1f} points over {row['model']} (95 % interval {low:+.1f} to "
            f"{high:+.1f}, p = {row['p_value']:.2g}, {row['n']} instructions)"
        )
    if "usage" in result:
        print(usage_line(result["usage"]))
    print(f"written to {result['out']}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{low:.1f} to {high:.1f}"
