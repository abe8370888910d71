"""The report of a run, or of several compared: one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import escape

from prefopt.errors import PrefoptError
from prefopt.eval import plots
from prefopt.eval.run_folder import Run, is_number, read_lines, read_runs, read_summary
from prefopt.rounds.storage import atomic_write

MAX_SAMPLES = 200
MAX_CELL = 2_000
MAX_FILE = 20_000
# Shares of the page; with the text around them it stays well under 3 MB. Files count in
# characters, of which escaping makes five bytes at worst.
SAMPLE_BYTES = 900_000
CURVE_BYTES = 1_200_000
FILE_CHARACTERS = 100_000

# In the order of the table's columns.
LABELS = {
    "win_rate": "win rate, %",
    "kl": "KL, nats",
    "mean_length": "mean length",
    "exploitability": "exploitability, 0-0.5",
    "seconds": "time",
    "ece": "expected calibration error",
}
# What is looked at first; a metric that stands in neither list comes between the two.
FIRST = ("loss", "rewards", "logps", "kl", "judge", "length")
LAST = ("grad_norm", "learning_rate", "tokens_per_second", "time")
NOTES = {
    "logps": "Both curves may fall while the margin between them rises: the loss asks only that "
    "the rejected answer lose more probability than the chosen one. Look closer when the chosen "
    "one falls steeply while KL or length runs away.",
}


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run folder, or into a folder of run folders.

    The page holds its plots and its few lines of script, loads nothing and stays under 3 MB: long
    curves are averaged, long samples and files are cut, and the page says so. It is written aside
    and renamed, so that a reader never meets half of it.

    Args:
        run_dir: A folder with any of `metrics.jsonl`, `recipe.yaml`, `environment.json`,
            `samples.jsonl` and `summary.json`, or one whose sub-folders hold the first three and
            which itself holds the last two. In `summary.json` win rates are in 0-100, KL in nats,
            `seconds` in seconds, and a judge's accuracies and errors are fractions.

    Returns:
        The path of the page.

    Raises:
        PrefoptError: The folder is missing, holds nothing to report on, or `summary.json` is not
            what it should be.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise PrefoptError(f"{folder}: no such folder: give the folder of a run to report on")
    remarks: list[str] = []
    runs = read_runs(folder.resolve(), remarks)
    summary = read_summary(folder / "summary.json")
    rows = read_lines(folder.resolve() / "samples.jsonl", remarks)
    samples = [row for row in rows if isinstance(row.get("answers"), dict)]
    if not (runs or summary or samples):
        raise PrefoptError(
            f"{folder}: nothing to report on: expected metrics.jsonl, summary.json, samples.jsonl, "
            "recipe.yaml or environment.json here or metrics.jsonl in its sub-folders"
        )
    page = _render(folder.resolve().name, runs, summary, samples, remarks)
    path = folder / "report.html"
    # A lone surrogate, which JSON can spell and UTF-8 cannot, must not make the page unwritable.
    atomic_write(path, page.encode(errors="replace"))
    return path


def _render(
    title: str,
    runs: dict[str, Run],
    summary: dict[str, Any],
    samples: list[dict[str, Any]],
    remarks: list[str],
) -> str:
    algorithms: dict[str, dict[str, Any]] = summary.get("algorithms", {})
    judges = {name: value for name, value in summary.items() if _is_judge(value)}
    answered = dict.fromkeys(name for row in samples for name in row["answers"])
    trained = {name: run for name, run in runs.items() if run.metrics}
    names = dict.fromkeys([*algorithms, *trained, *answered, *judges])
    styles = {name: plots.style_of(index) for index, name in enumerate(names)}
    trained = {name: trained[name] for name in names if name in trained}
    rates = {name: rate for name, row in algorithms.items() if (rate := _rate(row))}
    has_kl = any(rate.kl is not None for rate in rates.values())
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        seed=summary.get("seed"),
        styles=styles,
        algorithms=_algorithm_table(algorithms),
        remark=summary.get("remark", ""),
        settings={
            name: _algorithm_table(value["algorithms"])
            | {"exploitable": any("exploitability" in row for row in value["algorithms"].values())}
            | {"remark": value.get("remark", "")}
            for name, value in summary.items()
            if isinstance(value, dict) and isinstance(value.get("algorithms"), dict)
        },
        bars=plots.win_rate_bars(rates, styles) if rates else None,
        frontier=plots.frontier(rates, styles) if has_kl else None,
        judges=[_judge(name, value, styles[name]) for name, value in judges.items()],
        max_points=plots.MAX_POINTS,
        curves=_curves(trained, styles, remarks),
        overlaps=[note for name, run in trained.items() if (note := _overlap(name, run))],
        run_names=list(trained),
        last_values=_last_values(trained),
        samples=_sample_rows(samples),
        sample_names=[name for name in names if name in answered],
        files=_files(runs),
        remarks=remarks,
    )


def _overlap(name: str, run: Run) -> str:
    """What sampling beside training saved, and how old samples were for it."""
    saved, stale = (run.metrics.get(key, {}) for key in ("time/saved", "staleness"))
    if not saved or not stale:
        return ""
    return (
        f"{name}: sampling the next round beside training saved {sum(saved.values()):.0f} s; "
        f"pairs were one round old, up to {max(stale.values()):.0f} optimiser steps."
    )


def _is_judge(value: object) -> bool:
    return isinstance(value, dict) and ("accuracy" in value or "calibration" in value)


def _rate(row: Mapping[str, Any]) -> plots.Rate | None:
    rate, ci, kl = (row.get(key) for key in ("win_rate", "win_rate_ci", "kl"))
    if not is_number(rate):
        return None
    interval = None
    if isinstance(ci, list) and len(ci) == 2 and all(map(is_number, ci)):
        interval = (ci[0], ci[1])
    return plots.Rate(rate, interval, kl if is_number(kl) else None)


def _algorithm_table(algorithms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Known columns first, then whatever other numbers the summary holds; none of them empty."""
    found = [key for row in algorithms.values() for key, value in row.items() if is_number(value)]
    keys = [key for key in dict.fromkeys([*LABELS, *found]) if key in found]
    rows = {name: [_cell(key, row) for key in keys] for name, row in algorithms.items()}
    return {"head": [_label(key) for key in keys], "rows": rows if keys else {}}


def _cell(key: str, row: Mapping[str, Any]) -> str:
    value = row.get(key)
    if key == "win_rate" and (rate := _rate(row)):
        return f"{value:.1f}" + (f" [{rate.ci[0]:.1f}, {rate.ci[1]:.1f}]" if rate.ci else "")
    return _duration(value) if key == "seconds" and is_number(value) else _number(value)


def _number(value: object) -> str:
    """Three digits that matter; whole numbers and thousands in full."""
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def _label(key: str) -> str:
    return LABELS.get(key, key.replace("_", " "))


def _judge(name: str, values: Mapping[str, Any], style: plots.Style) -> dict[str, Any]:
    """A judge's numbers, its calibration plot, and tables such as `accuracy_by_length`."""
    tables = {
        key: [row for row in value if isinstance(row, dict)]
        for key, value in values.items()
        if isinstance(value, list)
    }
    keys = ("confidence", "accuracy", "count")
    bins = [
        row for row in tables.pop("calibration", []) if all(is_number(row.get(key)) for key in keys)
    ]
    return {
        "name": name,
        "facts": {_label(k): _number(v) for k, v in values.items() if is_number(v)},
        "plot": plots.calibration_plot(bins, style) if bins else None,
        "tables": [
            {
                "title": _label(key),
                "head": list(rows[0]),
                "rows": [[_number(row.get(column)) for column in rows[0]] for row in rows],
            }
            for key, rows in tables.items()
            if rows
        ],
    }


def _curves(
    runs: Mapping[str, Run], styles: Mapping[str, plots.Style], remarks: list[str]
) -> list[dict[str, Any]]:
    """Groups of panels: with several runs, losses and pairs run by run, the rest laid over."""
    groups: list[dict[str, Any]] = []
    shared: list[dict[str, Any]] = []
    size, left_out = 0, 0
    for metric, members in _panels(runs).items():
        own = len(runs) > 1 and (metric == "loss" or len(members) > 1)
        panels = []
        for shown in [[name] for name in runs] if own else [list(runs)]:
            lines = [line for name in shown for line in _lines(runs[name], members, styles[name])]
            if not any(len(set(line.y)) > 1 for line in lines):  # the table of last values says it
                continue
            if size > CURVE_BYTES:
                left_out += 1
                continue
            svg = plots.curves(lines, f"{metric} over steps: {', '.join(shown)}")
            size += len(svg)
            caption = shown[0] if own else metric
            note = "" if own else NOTES.get(metric, "")
            panels.append({"caption": caption, "run": own, "note": note, "svg": svg})
        if own and panels:
            groups.append({"title": metric, "note": NOTES.get(metric, ""), "panels": panels})
        else:
            shared.extend(panels)
    if left_out:
        remarks.append(f"{left_out} panels of curves are left out to keep the page small.")
    title = "all runs" if groups else ""
    return ([{"title": title, "note": "", "panels": shared}] if shared else []) + groups


def _last_values(runs: Mapping[str, Run]) -> list[list[str]]:
    """One row a metric, one column a run: also what was logged only once and has no curve."""

    def last(points: Mapping[float, float]) -> str:
        return _number([*points.values()][-1]) if points else "–"

    metrics = sorted({name for run in runs.values() for name in run.metrics})
    return [[name, *(last(run.metrics.get(name, {})) for run in runs.values())] for name in metrics]


def _panels(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """Panel -> its metrics: `x/chosen` and `x/rejected` share panel x, `eval_x` joins x."""
    names = dict.fromkeys(
        name.removeprefix("eval_") for run in runs.values() for name in run.metrics
    )
    panels: dict[str, list[str]] = {}
    for name in names:
        stem = name.rpartition("/")[0]
        pair = [f"{stem}/chosen", f"{stem}/rejected"]
        paired = name in pair and all(metric in names for metric in pair)
        panels.setdefault(stem if paired else name, []).append(name)

    def place(panel: str) -> tuple[int, str]:
        room = panel.split("/")[0]
        if room in FIRST:
            return FIRST.index(room), panel
        return (100 + LAST.index(room) if room in LAST else 50), panel

    return {panel: sorted(panels[panel]) for panel in sorted(panels, key=place)}


def _lines(run: Run, members: Iterable[str], style: plots.Style) -> list[plots.Line]:
    lines = []
    for metric in members:
        last = metric.rpartition("/")[2]
        label = last if last in ("chosen", "rejected") else ""
        for name in (metric, f"eval_{metric}"):
            if points := run.metrics.get(name):
                held_out = name != metric
                lines.append(
                    plots.Line(
                        list(points),
                        list(points.values()),
                        style,
                        f"{label} evaluation".strip() if held_out else label,
                        solid=label != "rejected",
                        points_only=held_out,
                    )
                )
    return lines


def _sample_rows(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The first samples that fit, each cell cut to MAX_CELL characters."""
    rows: list[dict[str, Any]] = []
    size = 0
    for sample in samples[:MAX_SAMPLES]:
        prompt = _clip(sample.get("prompt", ""), MAX_CELL)
        answers = {name: _clip(text, MAX_CELL) for name, text in sample["answers"].items()}
        size += sum(
            len(escape(text).encode(errors="replace")) for text in (prompt, *answers.values())
        )
        if size > SAMPLE_BYTES:
            break
        rows.append({"prompt": prompt, "answers": answers})
    return {"rows": rows, "total": len(samples)}


def _clip(text: object, limit: int) -> str:
    whole = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    more = len(whole) - limit
    return whole if more <= 0 else f"{whole[:limit]} … ({more:,} more characters)"


def _files(runs: Mapping[str, Run]) -> list[dict[str, str]]:
    """Recipes and environments; runs whose file is the same share one entry."""
    owners: dict[tuple[str, str], list[str]] = {}
    for kind in ("recipe", "environment"):
        for name, run in runs.items():
            if text := getattr(run, kind):
                owners.setdefault((kind, text), []).append(name)
    limit = min(MAX_FILE, FILE_CHARACTERS // max(len(owners), 1))
    return [
        {
            "title": f"{kind} ({', '.join(names)})" if len(runs) > 1 else kind,
            "text": _clip(text, limit),
        }
        for (kind, text), names in owners.items()
    ]
