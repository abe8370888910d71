"""``prefopt eval win-rate``: two models, or two files of answers, head to head."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.eval.answers import Answers, answers_of, is_answers_file, read_answers, read_prompts
from prefopt.eval.head_to_head import head_to_head
from prefopt.eval.judging import api_of, judge_of, judge_pairs, usage_line
from prefopt.eval.win_rate import win_rate
from prefopt.reward_models.api_judge import ApiJudge
from prefopt.rounds.storage import atomic_write
from prefopt.run_folder import environment

# Share of the longer answer's characters by which the first answer is longer.
LENGTH_BOUNDS = (-0.25, -0.05, 0.05, 0.25)
LENGTH_BINS = (
    "shorter by more than 25 %",
    "shorter by 5-25 %",
    "equal within 5 %",
    "longer by 5-25 %",
    "longer by more than 25 %",
)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers where models are given, judges, and writes ``result.json``.

    Raises:
        PrefoptError: A file, a model or the judge is not what it should be, or the two do not
            answer the same prompts.
    """
    folder = Path(arguments.out)
    if arguments.judge_kind == "api":  # what is wrong with its options comes before the answers
        api_of(arguments, folder)
    model, baseline = _both(arguments, folder)
    ours, theirs = model.by_key(), baseline.by_key()
    if ours.keys() != theirs.keys():
        raise PrefoptError(
            f"{arguments.model} and {arguments.baseline} must answer the same prompts; "
            f"{len(ours.keys() ^ theirs.keys())} answers have no counterpart (same prompt, same "
            "sample) in the other file"
        )
    prompts = [row.prompt for row in model.rows]
    a = [row.text for row in model.rows]
    b = [theirs[row.key].text for row in model.rows]
    judge, record = judge_of(arguments, folder)
    preferences = judge_pairs(judge, record, prompts, a, b, folder / "preferences.jsonl")
    result = {
        **head_to_head(preferences, a, b, [row.key[0] for row in model.rows]),
        "by_length": by_length(preferences, a, b),
        "model": arguments.model,
        "baseline": arguments.baseline,
        "judge": record,
        "decoding": {"model": model.decoding, "baseline": baseline.decoding},
        "environment": environment(),
        "out": str(folder),
    }
    if isinstance(judge, ApiJudge):
        result["usage"] = asdict(judge.api.usage)
    atomic_write(folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def _both(arguments: argparse.Namespace, folder: Path) -> tuple[Answers, Answers]:
    """Both sides' answers: those in files, and models' to the given prompts or to a file's."""
    sides = {"model": arguments.model, "baseline": arguments.baseline}
    files = {side: read_answers(path) for side, path in sides.items() if is_answers_file(path)}
    prompts: list[Prompt] | None = None
    if arguments.prompts:
        prompts = read_prompts(arguments.prompts, arguments.split, arguments.limit)
        files = {side: _only(answers, prompts, sides[side]) for side, answers in files.items()}
    elif len(files) == 1:
        (answers,) = files.values()
        if any(row.sample for row in answers.rows):
            raise PrefoptError(
                f"{answers.name}: found several answers to a prompt, but a model gives one; "
                "compare it with a file that `prefopt generate --samples` has written"
            )
        prompts = [row.prompt for row in answers.rows]
    elif not files:
        raise PrefoptError(
            "--prompts: expected the prompts that two models are to answer: a JSONL or Parquet "
            "file, or a Hub id"
        )
    made = {
        side: files.get(side)
        or answers_of(path, prompts or [], arguments, folder / f"{side}.jsonl")
        for side, path in sides.items()
    }
    return made["model"], made["baseline"]


def _only(answers: Answers, prompts: Sequence[Prompt], path: str) -> Answers:
    """A file's answers to the given prompts.

    Raises:
        PrefoptError: It has none to one of them.
    """
    wanted = {json.dumps(prompt, sort_keys=True): prompt for prompt in prompts}
    rows = [row for row in answers.rows if row.key[0] in wanted]
    missing = wanted.keys() - {row.key[0] for row in rows}
    if missing:
        raise PrefoptError(
            f"{path}: no answer to {len(missing)} of {len(wanted)} prompts of --prompts, the first "
            f"{min(missing):.80}"
        )
    return Answers(answers.name, rows)


def by_length(
    preferences: np.ndarray, a: Sequence[str], b: Sequence[str]
) -> list[dict[str, object]]:
    """Win rate by how much longer the first answer is, in characters.

    Args:
        preferences: Shape [pairs], P(a beats b); NaN where unjudged, which are left out.
        a: Shape [pairs].
        b: Shape [pairs].

    Returns:
        One row a bin that holds pairs: ``first answer``, ``pairs``, ``win_rate`` and its 95 %
        interval ``low`` and ``high`` in 0-100. If a row's rate differs from the next one's far
        beyond the intervals, the judge rewards length, or length comes with quality.
    """
    lengths = np.array([[len(x), len(y)] for x, y in zip(a, b, strict=True)], dtype=float)
    share = (lengths[:, 0] - lengths[:, 1]) / np.maximum(lengths.max(axis=1), 1)
    bins = np.where(np.isnan(preferences), -1, np.digitize(share, LENGTH_BOUNDS))
    rows: list[dict[str, object]] = []
    for number in np.unique(bins[bins >= 0]):
        rate = win_rate(preferences[bins == number])
        low, high = rate.ci
        row = {"pairs": rate.n, "win_rate": rate.win_rate, "low": low, "high": high}
        rows.append({"first answer": LENGTH_BINS[number], **row})
    return rows


def print_result(result: dict[str, Any]) -> None:
    """The win rate in a sentence, and the table by length."""
    low, high = result["win_rate_ci"]
    print(
        f"win rate {result['win_rate']:.1f} % (95 % interval {low:.1f}-{high:.1f}) on "
        f"{result['prompts']} prompts; mean length {result['mean_length']:.0f} against "
        f"{result['baseline_mean_length']:.0f} characters"
    )
    if controlled := result["length_controlled"]:
        print(
            f"length-controlled {controlled['win_rate']:.1f} %, fitted to these answers alone "
            "(docs/length_control.md)"
        )
    if result["unjudged"]:
        print(f"{result['unjudged']} answers of the judge could not be read and are left out")
    table = Table("first answer", "pairs", "win rate, %", "95 % interval")
    for row in result["by_length"]:
        interval = f"{row['low']:.1f}-{row['high']:.1f}"
        table.add_row(row["first answer"], str(row["pairs"]), f"{row['win_rate']:.1f}", interval)
    Console(markup=False).print(table)
    if "usage" in result:
        print(usage_line(result["usage"]))
    print(f"written to {result['out']}")
