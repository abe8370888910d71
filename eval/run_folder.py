"""What a run folder holds, read leniently: a run may still be going, or have been killed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from prefopt.errors import PrefoptError

Series = dict[float, float]
LARGEST = 1e300  # what plots can still lay out


@dataclass
class Run:
    """What one run folder holds: metric -> {step: value}, a summary, two files as text, and what
    guards found.
    """

    folder: Path
    metrics: dict[str, Series] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    environment: str = ""
    guards: list[dict[str, Any]] = field(default_factory=list)


def read_runs(folder: Path, remarks: list[str]) -> dict[str, Run]:
    """The run a folder is, or the runs in its sub-folders, or both, by folder name.

    Args:
        folder: A resolved path (its name is shown).
        remarks: Receives a sentence on whatever could not be read.
    """
    here = read_run(folder, remarks)
    runs = {folder.name: here} if here else {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        if run := read_run(path.parent, remarks):
            runs[path.parent.name] = run
    return runs


def read_run(folder: Path, remarks: list[str]) -> Run | None:
    """The run that a folder holds, or None."""
    run = Run(
        folder,
        _series(folder, read_lines(folder / "metrics.jsonl", remarks), remarks),
        read_object(folder / "summary.json", remarks),
        _read_text(folder / "recipe.yaml"),
        _read_text(folder / "environment.json"),
        read_lines(folder / "guards.jsonl", remarks),
    )
    known = run.metrics or run.recipe or run.environment or (folder / "evaluations").is_dir()
    return run if known else None


def _read_text(path: Path) -> str:
    if path.is_symlink() or not path.is_file():  # a link may lead to what is not to be shown
        return ""
    # some editors begin a file with a byte order mark
    return path.read_text(encoding="utf-8-sig", errors="replace")


def read_lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a half-written last line is a run still going, not a fault."""
    lines = [line for line in _read_text(path).split("\n") if line.strip()]
    rows = [_parsed(line) for line in lines]
    bad = rows[:-1].count(None)
    if bad:
        where = f"{path.parent.name}/{path.name}"
        remarks.append(f"{where}: {bad} of {len(rows)} lines are not JSON objects; left out.")
    return [row for row in rows if row is not None]


def read_object(path: Path, remarks: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none, or none that can be read."""
    text = _read_text(path)
    found = _parsed(text) if text else {}
    if found is None:
        remarks.append(f"{path.parent.name}/{path.name}: not a JSON object; left out.")
    return found or {}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, too many digits, too many brackets
        return None
    return row if isinstance(row, dict) else None


def read_summary(path: Path) -> dict[str, Any]:
    """The object in `summary.json`, empty when there is none.

    Raises:
        PrefoptError: It is not a JSON object, or its `algorithms` are not objects by name.
    """
    text = _read_text(path)
    if not text:
        return {}
    summary = _parsed(text)
    if summary is None:
        raise PrefoptError(f"{path}: not a JSON object: write it again or remove it")
    algorithms = summary.get("algorithms", {})
    if not isinstance(algorithms, dict):
        raise PrefoptError(
            f"{path}: 'algorithms' is a {type(algorithms).__name__}: expected an object"
        )
    for name, row in algorithms.items():
        if not isinstance(row, dict):
            raise PrefoptError(
                f"{path}: 'algorithms.{name}' is a {type(row).__name__}: expected an object"
            )
    return summary


def _series(folder: Path, rows: list[dict[str, Any]], remarks: list[str]) -> dict[str, Series]:
    """Metric -> {step: value} in order of step; of a step logged twice the later value counts."""
    counted = any(is_number(row.get("step")) for row in rows)
    series: dict[str, Series] = {}
    lost: dict[str, int] = {}
    step = 0.0
    for index, row in enumerate(rows):
        if is_number(row.get("step")):
            step = float(row["step"])
        elif not counted:
            step = float(index)
        for name, value in row.items():
            if name in ("step", "epoch") or not _is_measured(value):
                continue
            if is_number(value):
                series.setdefault(name, {})[step] = float(value)
            else:
                lost[name] = lost.get(name, 0) + 1
    if lost:
        what = ", ".join(f"{name} ({count})" for name, count in lost.items())
        remarks.append(f"{folder.name}: values that are not finite, not drawn: {what}.")
    return {name: dict(sorted(points.items())) for name, points in series.items()}


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number, which true and false are not."""
    return _is_measured(value) and abs(value) <= LARGEST


def _is_measured(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
