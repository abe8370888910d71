"""The part of a report on evaluations in training: tables and plots of win rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefopt.eval import plots
from prefopt.eval.evaluations import (
    Evaluation,
    differences,
    interval,
    judge_in_words,
    lc_win_rate,
    run_row,
)
from prefopt.eval.numbers import LABELS, duration, label, number
from prefopt.eval.run_folder import Run, is_number
from prefopt.eval.side_by_side import MAX_CELL, clip

COLUMNS = (
    "win_rate",
    "lc_win_rate",
    "kl",
    "mean_length",
    "baseline_mean_length",
    "steps",
    "seconds",
)
HOW_TO_GET = {
    "win_rate": "no evaluation: train with an `eval` section in the recipe",
    "kl": "evaluations measure it (an `eval` section in the recipe), but not of sft, nor where "
    "whole weights are in shards",
    "seconds": "no summary.json: the run is not finished; the same `prefopt train` goes on with it",
}


def evaluation_part(
    runs: Mapping[str, Run],
    evaluations: Mapping[str, Sequence[Evaluation]],
    styles: Mapping[str, plots.Style],
) -> dict[str, Any]:
    """What the page shows of evaluations.

    Args:
        runs: Those that have a row, by name.
        evaluations: Of each run, in order.
        styles: Of the runs.

    Returns:
        `head` and `rows` of the table of last evaluations, `notes` on what is missing there,
        `warnings` on why win rates must not be compared, `alarms`, `figures` (caption, plot), and
        for each run the table of all its evaluations, `histories`.
    """
    known = {name: run_row(runs[name], evaluations[name]) for name in runs}
    warnings = differences(runs, evaluations)
    kept = [key for key in COLUMNS if any(key in row for row in known.values())]
    return {
        "title": "Runs" if len(runs) > 1 else "Evaluation",
        "head": [label(key) for key in kept],
        "rows": {name: [cell(key, row, "missing") for key in kept] for name, row in known.items()},
        "notes": [*early_ends(known), *missing(known)],
        "warnings": warnings,
        "alarms": alarms(evaluations),
        "figures": [] if warnings else _figures(known, evaluations, styles),
        "histories": {name: _history(found) for name, found in evaluations.items() if found},
    }


def early_ends(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which runs ended early, and why."""
    return [
        f"{name} ended early: {clip(row['stopped'], MAX_CELL)}."
        for name, row in rows.items()
        if "stopped" in row
    ]


def alarms(evaluations: Mapping[str, Sequence[Evaluation]]) -> list[str]:
    """The first alarm of each run that had one."""
    first = {
        name: next((each.alarm for each in found if each.alarm is not None), None)
        for name, found in evaluations.items()
    }
    return [f"{name}: {clip(alarm, MAX_CELL)}." for name, alarm in first.items() if alarm]


def missing(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which runs lack what, and how it is got."""
    notes = []
    for key, how in HOW_TO_GET.items():
        names = [name for name, row in rows.items() if key not in row]
        if names:
            notes.append(f"{label(key).split(',')[0]} is missing for {', '.join(names)}: {how}.")
    return notes


def cell(key: str, row: Mapping[str, Any], absent: str = "–") -> str:
    """One value of a run's row as text."""
    value = row.get(key)
    if value is None or (key in LABELS and not is_number(value)):
        return absent
    if key in ("win_rate", "lc_win_rate"):
        ci = interval(row) if key == "win_rate" else None
        return f"{value:.1f}" + (f" [{ci[0]:.1f}, {ci[1]:.1f}]" if ci else "")
    if key == "kl" and "kl_step" in row:
        return f"{number(value)} (at step {row['kl_step']:.0f})"
    return duration(value) if key == "seconds" else number(value)


def _figures(
    rows: Mapping[str, Mapping[str, Any]],
    evaluations: Mapping[str, Sequence[Evaluation]],
    styles: Mapping[str, plots.Style],
) -> list[dict[str, Any]]:
    """Title, remark and plot of each figure that there is something to draw for."""
    found = {name: each for name, each in evaluations.items() if each}
    if not found:
        return []
    bars = {name: each[-1].rate(0.0) for name, each in found.items()}
    units = {str(each.result.get("unit", "round")) for path in found.values() for each in path}
    key, unit = ("after", units.pop()) if len(units) == 1 else ("step", "step")
    over_time = {name: _path(each, key) for name, each in found.items()}
    by_kl = {
        name: path
        for name, each in found.items()
        if (path := [one.rate(one.kl) for one in each if one.kl is not None])
    }
    by_minutes = {
        name: [bars[name]._replace(x=row["seconds"] / 60, label=name)]
        for name, row in rows.items()
        if name in bars and "seconds" in row
    }
    figures = [
        ("Win rate", "of the last evaluation", plots.win_rate_bars(bars, styles, name="win-rate"))
    ]

    def draw(what: str, x: str, remark: str, paths: dict[str, list[plots.Rate]]) -> None:
        title = f"Win rate {what}"
        name = title.lower().replace(" ", "-")
        plot = plots.win_rate_paths(
            paths, styles, name=name, title=title, x=x, labelled=paths is not over_time
        )
        figures.append((title, remark, plot))

    if any(len(path) > 1 for path in over_time.values()):
        draw(f"over {unit}s", f"{unit}s of training", "one point an evaluation", over_time)
    if by_kl:
        remark = "higher and further left is better; small points are earlier evaluations"
        draw("against KL", "KL from the reference, nats", remark, by_kl)
    if len(by_minutes) > 1:
        draw("against time", "minutes of training", "of the whole training", by_minutes)
    return [{"title": title, "remark": remark, "plot": plot} for title, remark, plot in figures]


def _path(evaluations: Sequence[Evaluation], key: str) -> list[plots.Rate]:
    at = [(each, each.number(key)) for each in evaluations]
    return [each.rate(x) for each, x in at if x is not None]


def _history(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """All evaluations of a run as a table, and by whom they were judged."""
    keys = ("wins", "ties", "losses", "prompts", "mean_length", "baseline_mean_length")
    watched = any(each.number("training_win_rate") is not None for each in evaluations)
    head = [
        *("after", "step", "win rate, %", "length-controlled, %"),
        *(["by the judge of training, %"] if watched else []),
        *("KL, nats", *map(label, keys)),
    ]
    rows = [
        [
            f"{each.after} (alarm)" if each.alarm is not None else each.after,
            number(each.result.get("step")),
            cell("win_rate", each.result),
            number(lc_win_rate(each)),
            *([number(each.number("training_win_rate"))] if watched else []),
            number(each.kl),
            *(number(each.result.get(key)) for key in keys),
        ]
        for each in evaluations
    ]
    last = evaluations[-1].result
    told = f"{judge_in_words(last.get('judge'))}; baseline: {last.get('baseline')}"
    return {"head": head, "rows": rows, "facts": clip(told, MAX_CELL)}
