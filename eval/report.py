"""The report of a run, or of several compared: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from prefopt.errors import PrefoptError
from prefopt.eval import plots
from prefopt.eval.evaluations import interval, read_evaluations
from prefopt.eval.numbers import LABELS, duration, label, number
from prefopt.eval.plot_files import Plot, save_plots
from prefopt.eval.report_curves import curve_groups, last_values
from prefopt.eval.report_evaluations import cell, evaluation_part
from prefopt.eval.run_folder import Run, is_number, read_lines, read_runs, read_summary
from prefopt.eval.side_by_side import (
    Row,
    clip,
    length_table,
    lengths_of,
    page_rows,
    rows_of_evaluations,
    rows_of_samples,
)
from prefopt.rounds.storage import atomic_write

MAX_FILE = 20_000
# Of the page, which with its answers and curves stays well under 3 MB; escaping makes five bytes
# of a character at worst.
FILE_CHARACTERS = 100_000
MIN_LENGTHS = 10  # answers that make a histogram
MAX_JUDGES = 12  # on the page
MAX_SENTENCE = 2_000
MAX_GUARDS = 20  # of a run, the last ones


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run folder, or into a folder of run folders.

    The page holds its plots and its few lines of script, loads nothing and stays under 3 MB: long
    curves are averaged, long samples and files are cut, and the page says so. It is written aside
    and renamed, so that a reader never meets half of it. Beside it, `plots/` receives every plot
    as PNG, SVG and CSV.

    Args:
        run_dir: A folder with any of `metrics.jsonl`, `recipe.yaml`, `environment.json`,
            `guards.jsonl`, `evaluations/`, `samples.jsonl` and `summary.json`, or one whose
            sub-folders hold these and which may itself hold the last two. In `summary.json` win
            rates are in 0-100, KL in nats, `seconds` in seconds, and a judge's accuracies and
            errors are fractions.

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
    summary = read_summary(folder / "summary.json")
    runs = read_runs(folder.resolve(), remarks)
    lines = read_lines(folder.resolve() / "samples.jsonl", remarks)
    rows = rows_of_samples(row for row in lines if isinstance(row.get("answers"), dict))
    if not (runs or summary or rows):
        raise PrefoptError(
            f"{folder}: nothing to report on: expected metrics.jsonl, summary.json, samples.jsonl, "
            "recipe.yaml or environment.json here or metrics.jsonl in its sub-folders"
        )
    return write_page(folder, folder.resolve().name, runs, summary, rows, remarks)


def write_page(
    folder: Path,
    title: str,
    runs: dict[str, Run],
    summary: dict[str, Any],
    rows: Sequence[Row],
    remarks: list[str],
    *,
    compared: bool = False,
) -> Path:
    """Writes `report.html` and `plots/` into a folder.

    Args:
        folder: Where to.
        title: Of the page.
        runs: By name.
        summary: What is known of all of them together.
        rows: Answers side by side; where there are none, those of evaluations are taken.
        remarks: Sentences for the head of the page.
        compared: Whether runs without an evaluation have a row among the others too.

    Returns:
        The path of the page.
    """
    path = folder / "report.html"
    with warnings.catch_warnings():  # names may have letters that the font of PNG files lacks
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        page, drawn = _render(title, runs, summary, rows, remarks, compared)
    save_plots(folder / "plots", drawn)
    # A lone surrogate, which JSON can spell and UTF-8 cannot, must not make the page unwritable.
    atomic_write(path, page.encode(errors="replace"))
    return path


def _render(
    title: str,
    runs: dict[str, Run],
    summary: dict[str, Any],
    rows: Sequence[Row],
    remarks: list[str],
    compared: bool,
) -> tuple[str, list[Plot]]:
    """The page, and all plots on it."""
    evaluations = {name: read_evaluations(run, remarks) for name, run in runs.items()}
    baselines = _first_is_baseline(rows)
    if not rows:
        rows, baselines = rows_of_evaluations(runs, evaluations, remarks)
    algorithms: dict[str, dict[str, Any]] = summary.get("algorithms", {})
    judges = _judges(summary, runs)
    if len(judges) > MAX_JUDGES:
        remarks.append(f"{len(judges) - MAX_JUDGES} judges are left out to keep the page small.")
        judges = dict(list(judges.items())[:MAX_JUDGES])
    # what the others are compared with stands first, beside the prompt
    answered = dict.fromkeys([*baselines.values(), *(name for row in rows for name in row.answers)])
    trained = [name for name, run in runs.items() if run.metrics]
    names = dict.fromkeys([*algorithms, *trained, *runs, *answered, *judges])
    styles = {name: plots.style_of(index) for index, name in enumerate(names)}
    trained = [name for name in names if name in trained]
    evaluated = {n: runs[n] for n in names if n in runs and (compared or evaluations[n])}
    parts = {
        "algorithm_figures": _algorithm_figures(algorithms, styles),
        "evaluation": evaluation_part(evaluated, evaluations, styles) if evaluated else None,
        "judges": [_judge(name, value, styles[name]) for name, value in judges.items()],
        "lengths": _lengths(rows, list(answered), baselines, styles),
        "curves": curve_groups(
            {name: runs[name] for name in trained},
            styles,
            remarks,
            evaluated=any(evaluations.values()),
        ),
    }
    drawn = _plots(parts)
    script = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
    page = _template().render(
        title=title,
        seed=summary.get("seed"),
        facts=_facts(runs),
        styles=styles,
        algorithms=_algorithm_table(algorithms),
        remark=clip(summary.get("remark", ""), MAX_SENTENCE),
        settings=_settings(summary),
        max_points=plots.MAX_POINTS,
        guards=[note for name, run in runs.items() for note in _guards(name, run)],
        overlaps=[note for name in trained if (note := _overlap(name, runs[name]))],
        rounds={name: table for name in trained if (table := _rounds(runs[name]))},
        run_names=trained,
        last_values=last_values({name: runs[name] for name in trained}),
        samples=page_rows(rows, list(answered)),
        sample_names=list(answered),
        determinism=_determinism(runs),
        files=_files(runs),
        remarks=[clip(remark, MAX_SENTENCE) for remark in remarks],
        plot_count=len(drawn),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **parts,
    )
    return page, drawn


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _plots(part: object) -> list[Plot]:
    """All plots within the parts of the page, in their order."""
    if isinstance(part, Plot):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [plot for each in inner for plot in _plots(each)]


def _first_is_baseline(rows: Sequence[Row]) -> dict[str, str]:
    """In samples side by side the first answer is the one that the others are compared with."""
    names = list(dict.fromkeys(name for row in rows for name in row.answers))
    return dict.fromkeys(names[1:], names[0]) if names else {}


def _facts(runs: Mapping[str, Run]) -> str:
    """What the summary of a single run begins with, as a line."""
    if len(runs) != 1:
        return ""
    (run,) = runs.values()
    words = [str(run.summary["algorithm"])] if "algorithm" in run.summary else []
    for key in ("steps", "rows"):
        if is_number(value := run.summary.get(key)):
            words.append(f"{number(value)} {key}")
    if is_number(seconds := run.summary.get("seconds")):
        words.append(duration(seconds))
    return ", ".join(words)


def _rounds(run: Run) -> dict[str, Any]:
    """Counts and means of each round, one row a round."""
    found = run.summary.get("rounds")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    head = list(dict.fromkeys(key for row in rows for key in row))
    return {"head": head, "rows": [[number(row.get(key)) for key in head] for row in rows]}


def _guards(name: str, run: Run) -> list[str]:
    """What guards found in a run, a sentence each."""
    return [
        f"{name}, step {number(row.get('step'))}: {clip(str(row.get('message')), MAX_SENTENCE)}"
        for row in run.guards[-MAX_GUARDS:]
    ]


def _overlap(name: str, run: Run) -> str:
    """What sampling beside training saved, and how old samples were for it."""
    saved, stale = (run.metrics.get(key, {}) for key in ("time/saved", "staleness"))
    if not saved or not stale:
        return ""
    return (
        f"{name}: sampling the next round beside training saved {sum(saved.values()):.0f} s; "
        f"pairs were one round old, up to {max(stale.values()):.0f} optimiser steps."
    )


def _algorithm_figures(
    algorithms: Mapping[str, Mapping[str, Any]], styles: Mapping[str, plots.Style]
) -> list[dict[str, Any]]:
    rated = {name: row for name, row in algorithms.items() if is_number(row.get("win_rate"))}
    if not rated:
        return []
    bars = {name: plots.Rate(row["win_rate"], interval(row), 0.0) for name, row in rated.items()}
    plot = plots.win_rate_bars(bars, styles, name="algorithms-win-rate")
    figures = [{"title": "Win rate", "remark": "", "plot": plot}]
    points = {
        name: [bars[name]._replace(x=row["kl"])]
        for name, row in rated.items()
        if is_number(row.get("kl"))
    }
    if points:
        plot = plots.win_rate_paths(
            points,
            styles,
            name="algorithms-frontier",
            title="Win rate against KL from the reference",
            x="KL from the reference, nats",
        )
        remark = "higher and further left is better"
        figures.append({"title": "Win rate against KL", "remark": remark, "plot": plot})
    return figures


def _settings(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Other settings in which the algorithms were compared too, by name."""
    return {
        name: _algorithm_table(value["algorithms"])
        | {"exploitable": any("exploitability" in row for row in value["algorithms"].values())}
        | {"remark": clip(value.get("remark", ""), MAX_SENTENCE)}
        for name, value in summary.items()
        if isinstance(value, dict) and _are_objects(value.get("algorithms"))
    }


def _are_objects(rows: object) -> bool:
    return isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())


def _algorithm_table(algorithms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Known columns first, then whatever other numbers the summary holds; none of them empty."""
    found = [key for row in algorithms.values() for key, value in row.items() if is_number(value)]
    keys = [key for key in dict.fromkeys([*LABELS, *found]) if key in found]
    rows = {name: [cell(key, row) for key in keys] for name, row in algorithms.items()}
    return {"head": [label(key) for key in keys], "rows": rows if keys else {}}


def _judges(summary: Mapping[str, Any], runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Reports on judges by name: of the whole, and of runs that it does not tell of."""
    judges = {name: value for name, value in summary.items() if _is_judge(value)}
    for name, run in runs.items():
        for value in run.summary.values():
            if _is_judge(value) and value not in judges.values():
                judges[name] = value
    return judges


def _is_judge(value: object) -> bool:
    return isinstance(value, dict) and ("accuracy" in value or "calibration" in value)


def _lengths(
    rows: Sequence[Row],
    names: Sequence[str],
    baselines: Mapping[str, str],
    styles: Mapping[str, plots.Style],
) -> dict[str, Any] | None:
    """Lengths of answers before and after training, where there are enough of them."""
    lengths = {
        name: values
        for name, values in lengths_of(rows, names).items()
        if len(values) >= MIN_LENGTHS
    }
    before = {
        name: lengths[base]
        for name, base in baselines.items()
        if name in lengths and base in lengths
    }
    if not lengths:
        return None
    shown = {name: lengths[name] for name in before or lengths}
    head, table = length_table(lengths, {name: baselines[name] for name in before})
    return {
        "plot": plots.length_histograms(shown, before, styles),
        "head": head,
        "rows": table,
        "outlined": bool(before),
    }


def _judge(name: str, values: Mapping[str, Any], style: plots.Style) -> dict[str, Any]:
    """A judge's numbers, its calibration plot, and tables such as `accuracy_by_length`."""
    tables = {
        key: [row for row in value if isinstance(row, dict)]
        for key, value in values.items()
        if isinstance(value, list)
    }
    bins = [row for row in tables.pop("calibration", []) if _is_bin(row)]
    return {
        "name": name,
        "facts": {label(k): number(v) for k, v in values.items() if is_number(v)},
        "plot": plots.calibration_plot(name, bins, style) if bins else None,
        "tables": [
            {
                "title": label(key),
                "head": list(rows[0]),
                "rows": [[number(row.get(column)) for column in rows[0]] for row in rows],
            }
            for key, rows in tables.items()
            if rows
        ],
    }


def _is_bin(row: Mapping[str, Any]) -> bool:
    """Whether a row of a calibration table can be drawn."""
    rates = (row.get(key) for key in ("confidence", "accuracy"))
    return is_number(row.get("count")) and all(is_number(rate) and 0 <= rate <= 1 for rate in rates)


def _determinism(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """What is the same in a repeated run; runs of which the same is said share one entry."""
    owners: dict[tuple[str, ...], list[str]] = {}
    for name, run in runs.items():
        try:
            found = json.loads(run.environment or "{}")
        except (RecursionError, ValueError):  # the file is shown as it is
            continue
        said = found.get("determinism") if isinstance(found, dict) else None
        if isinstance(said, list) and said:
            owners.setdefault(tuple(clip(str(each), MAX_SENTENCE) for each in said), []).append(
                name
            )
    return [{"names": names, "sentences": said[:20]} for said, names in owners.items()]


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
            "text": clip(text, limit),
        }
        for (kind, text), names in owners.items()
    ]
