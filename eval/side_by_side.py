"""Answers side by side, and how long they are: from samples, or from evaluations in training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import escape

from prefopt.eval.evaluations import Evaluation
from prefopt.eval.run_folder import Run, is_number, read_lines

MAX_ROWS = 200
MAX_CELL = 2_000
MAX_BYTES = 800_000  # of the page
CELL_BYTES = 150  # of a cell's tags


@dataclass
class Row:
    """The answers to one prompt by name, and how often each was preferred to the baseline's.

    Attributes:
        prompt: Text, or whatever else the file holds in its place.
        answers: By name.
        preferences: By name, in [0, 1]; only where a judge compared.
    """

    prompt: Any
    answers: dict[str, Any] = field(default_factory=dict)
    preferences: dict[str, float] = field(default_factory=dict)


def rows_of_samples(samples: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a `samples.jsonl`."""
    return [Row(row.get("prompt", ""), row["answers"]) for row in samples]


def rows_of_evaluations(
    runs: Mapping[str, Run], evaluations: Mapping[str, Sequence[Evaluation]], remarks: list[str]
) -> tuple[list[Row], dict[str, str]]:
    """The answers of the last evaluation of each run beside those of its baseline.

    Args:
        runs: By name.
        evaluations: Of the runs, in order.
        remarks: Receives a sentence on lines that could not be read.

    Returns:
        One row a prompt and sample, and the name of each run's baseline among the answers: one for
        all of them where they share it.
    """
    rows: dict[tuple[str, str], Row] = {}
    shared: dict[str, str] = {}
    names: dict[str, str] = {}
    for name, found in evaluations.items():
        folder = found[-1].folder if found else None
        if folder is None:
            continue
        base = read_lines(runs[name].folder / "evaluations" / "baseline.jsonl", remarks)
        own = read_lines(folder / "answers.jsonl", remarks)
        if base:
            new = f"baseline of {name}" if shared else "baseline"
            same = json.dumps([[_key(line), line.get("completion")] for line in base])
            names[name] = shared.setdefault(same, new if new not in runs else f"{new} (answers)")
        for answerer, lines in ((names.get(name, ""), base), (name, own)):
            for line in lines:
                row = rows.setdefault(_key(line), Row(_as_text(line.get("prompt"))))
                row.answers[answerer] = line.get("completion", "")
        preferred = _preferences(read_lines(folder / "preferences.jsonl", remarks))
        numbers = {prompt: n for n, prompt in enumerate(dict.fromkeys(_key(x)[0] for x in own))}
        for (prompt, _), row in rows.items():
            if (value := preferred.get(numbers.get(prompt))) is not None:
                row.preferences[name] = value
    return list(rows.values()), names


def _key(line: Mapping[str, Any]) -> tuple[str, str]:
    return json.dumps(line.get("prompt"), sort_keys=True), json.dumps(line.get("sample", 0))


def _as_text(prompt: Any) -> Any:
    """A conversation as lines; whatever is none as it is."""
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return prompt
    return "\n".join(f"{m.get('role', '?')}: {m.get('content', '')}" for m in prompt)


def _preferences(lines: Iterable[Mapping[str, Any]]) -> dict[int | None, float]:
    """Mean preference by number of the prompt; what the judge could not tell is left out."""
    values: dict[int | None, list[float]] = {}
    for line in lines:
        index, value = line.get("prompt"), line.get("preference")
        if isinstance(index, int) and is_number(value):
            values.setdefault(index, []).append(value)
    return {index: sum(each) / len(each) for index, each in values.items()}


def page_rows(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """The first rows that fit on the page, each cell cut to MAX_CELL characters.

    Args:
        rows: All rows.
        names: Of whose answers there are, in the order of their columns.
    """
    judged = [name for name in names if any(name in row.preferences for row in rows)]
    shown: list[dict[str, Any]] = []
    size = 0
    for row in rows[:MAX_ROWS]:
        prompt = clip(row.prompt, MAX_CELL)
        answers = {name: clip(text, MAX_CELL) for name, text in row.answers.items()}
        texts = [prompt, *answers.values(), *names]
        size += sum(len(escape(text).encode(errors="replace")) for text in texts)
        size += CELL_BYTES * len(names)
        if size > MAX_BYTES:
            break
        values = [row.preferences.get(name) for name in judged]
        shown.append(
            {
                "prompt": prompt,
                "answers": answers,
                "outcomes": {name: _outcome(p) for name, p in row.preferences.items()},
                "preferences": ",".join("" if p is None else f"{p:.6g}" for p in values),
            }
        )
    return {"rows": shown, "total": len(rows), "judged": judged}


def _outcome(preference: float) -> dict[str, str]:
    """As in a win rate: a tie is one half exactly, whatever is above it is a win."""
    word = "tie" if abs(preference - 0.5) <= 1e-9 else "win" if preference > 0.5 else "loss"
    return {"word": word, "value": f"{preference:.3f}"}


def clip(value: object, limit: int) -> str:
    """Text, or JSON of what is none, cut to a number of characters that says so."""
    whole = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(whole) - limit
    return whole if more <= 0 else f"{whole[:limit]} … ({more:,} more characters)"


def lengths_of(rows: Sequence[Row], names: Sequence[str]) -> dict[str, list[int]]:
    """Characters of each answer, by name."""
    return {
        name: [len(row.answers[name]) for row in rows if isinstance(row.answers.get(name), str)]
        for name in names
    }


def length_table(
    lengths: Mapping[str, Sequence[int]], baselines: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Means and quantiles by name; with a baseline, how far the mean moved from it."""
    head = ["answers of", "answers", "mean", "median", "10 %", "90 %", "mean over baseline's"]
    rows = []
    for name, values in lengths.items():
        low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
        base = np.mean(lengths[baselines[name]]) if name in baselines else 0.0
        change = f"{100 * (np.mean(values) / base - 1):+.0f} %" if base else "–"
        cells = [f"{value:.0f}" for value in (np.mean(values), middle, low, high)]
        rows.append([name, f"{len(values):,}", *cells, change])
    return head, rows
