"""What training evaluated as it went, read from run folders, and whether runs may be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.eval.plots import Rate
from prefopt.eval.run_folder import Run, Series, is_number, read_lines, read_object


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        result: What its `result.json` says; `win_rate` is a number in 0-100.
        kl: KL of the evaluated policy from the reference in nats, None where it is not known.
        folder: Where its answers are, None where only the summary tells of it.
    """

    result: Mapping[str, Any]
    kl: float | None
    folder: Path | None

    @property
    def after(self) -> str:
        """How far the run was, in words."""
        return f"{self.result.get('unit', 'round')} {self.result.get('after', '?')}"

    def number(self, key: str) -> float | None:
        """A number of the result, None where it is missing."""
        value = self.result.get(key)
        return value if is_number(value) else None

    @property
    def alarm(self) -> str | None:
        """The alarm that it raised, in words."""
        alarm = self.result.get("alarm")
        return alarm if isinstance(alarm, str) else None

    def rate(self, x: float) -> Rate:
        """The win rate at some place of a plot's horizontal axis."""
        return Rate(self.result["win_rate"], interval(self.result), x, self.after)


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95 % interval of a row's win rate, where it has one."""
    ci = row.get("win_rate_ci")
    if isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci)):
        return ci[0], ci[1]
    return None


def read_evaluations(run: Run, remarks: list[str]) -> list[Evaluation]:
    """The evaluations of a run in order: of its folder, else those its summary tells of.

    Args:
        run: The run.
        remarks: Receives a sentence on whatever could not be read.
    """
    paths = sorted(run.folder.glob("evaluations/*/result.json"))
    found: list[tuple[dict[str, Any], Path | None]] = [
        (read_object(path, remarks), path.parent) for path in paths
    ]
    told = run.summary.get("evaluations")
    if not found and isinstance(told, list):
        found = [(row, None) for row in told if isinstance(row, dict)]
    kls = run.metrics.get("kl", {})
    evaluations = [
        Evaluation(row, _kl(row, kls), folder)
        for row, folder in found
        if is_number(row.get("win_rate"))
    ]
    if len(evaluations) < len(found):
        missing = len(found) - len(evaluations)
        remarks.append(f"{run.folder.name}: {missing} evaluations have no win rate; left out.")
    return sorted(evaluations, key=lambda each: each.number("step") or 0)


def _kl(result: Mapping[str, Any], logged: Series) -> float | None:
    """The result's own KL, or what training logged around its step, but nothing beyond that."""
    kl, step = result.get("kl"), result.get("step")
    if is_number(kl):
        return kl
    steps = list(logged)
    if not steps or not is_number(step) or not steps[0] <= step <= steps[-1]:
        return None
    return float(np.interp(step, steps, list(logged.values())))


def run_row(run: Run, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """A run in numbers, as of its last evaluation; what is not known is missing.

    Returns:
        Of `algorithm`, `win_rate` and `win_rate_ci` (0-100), `lc_win_rate` (0-100), `prompts`,
        `kl` in nats, `mean_length` and `baseline_mean_length` in characters, `seconds` and
        `steps` those that are known; `kl_step` where the KL is the last that was logged, of
        an earlier step than the evaluation; and `stopped`, why training ended early.
    """
    row: dict[str, Any] = {}
    if isinstance(name := run.summary.get("algorithm"), str):
        row["algorithm"] = name
    if evaluations:
        last = evaluations[-1]
        for key in ("win_rate", "prompts", "mean_length", "baseline_mean_length"):
            if (value := last.number(key)) is not None:
                row[key] = value
        if ci := interval(last.result):
            row["win_rate_ci"] = list(ci)
        if (lc := lc_win_rate(last)) is not None:
            row["lc_win_rate"] = lc
        if last.kl is not None:
            row["kl"] = last.kl
    logged = run.metrics.get("kl")
    if "kl" not in row and logged:
        row["kl_step"], row["kl"] = [*logged.items()][-1]
    if isinstance(why := run.summary.get("stopped"), str):
        row["stopped"] = why
    for key in ("seconds", "steps"):
        if is_number(value := run.summary.get(key)):
            row[key] = value
    return row


def lc_win_rate(evaluation: Evaluation) -> float | None:
    """The length-controlled win rate in 0-100, where there is one."""
    controlled = evaluation.result.get("length_controlled")
    value = controlled.get("win_rate") if isinstance(controlled, dict) else None
    return value if is_number(value) else None


def differences(
    runs: Mapping[str, Run], evaluations: Mapping[str, Sequence[Evaluation]]
) -> list[str]:
    """What keeps the last evaluations of runs from being compared, a sentence each.

    Win rates mean the same only on the same prompts, against the same answers, by the same judge.
    """
    last = {name: found[-1] for name, found in evaluations.items() if found and name in runs}
    if len(last) < 2:
        return []
    base = {
        name: read_lines(runs[name].folder / "evaluations" / "baseline.jsonl", []) for name in last
    }
    if unknown := [name for name, rows in base.items() if not rows]:
        return [
            "Whether win rates may be compared is not known: evaluations/baseline.jsonl is missing "
            f"in {', '.join(unknown)}."
        ]
    judges = {name: judge_in_words(_asked(each)) for name, each in last.items()}
    prompts = {name: _as_key([row.get("prompt") for row in rows]) for name, rows in base.items()}
    answers = {
        name: _as_key([row.get("completion") for row in rows]) for name, rows in base.items()
    }
    sentences = []
    if len(set(judges.values())) > 1:
        parts = (f"{', '.join(names)} ({judge})" for judge, names in _groups(judges).items())
        sentences.append(f"Win rates are not comparable, judges differ: {' / '.join(parts)}.")
    if len(set(prompts.values())) > 1:
        sentences.append(_differ("prompts", prompts))
    elif len(set(answers.values())) > 1:
        sentences.append(_differ("answers of the baselines", answers))
    return sentences


def _asked(evaluation: Evaluation) -> object:
    """The judge; where its weights are known, it is the same wherever it lies."""
    judge = evaluation.result.get("judge")
    if isinstance(judge, dict) and "weights" in judge:
        return {key: value for key, value in judge.items() if key != "path"}
    return judge


def judge_in_words(judge: object) -> str:
    """The description of a judge on one line."""
    if not isinstance(judge, dict):
        return f"judge: {judge}"
    return "judge: " + ", ".join(f"{key} {judge[key]}" for key in sorted(judge))


def _differ(what: str, keys: Mapping[str, str]) -> str:
    parts = (", ".join(names) for names in _groups(keys).values())
    return f"Win rates are not comparable, {what} differ: {' / '.join(parts)}."


def _groups(keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Names that have the same key, by key."""
    groups: dict[str, list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    return groups


def _as_key(value: object) -> str:
    return json.dumps(value, sort_keys=True)
