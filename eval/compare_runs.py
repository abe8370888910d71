"""``prefopt compare``: runs of several algorithms side by side, from their folders."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.errors import PrefoptError
from prefopt.eval.evaluations import differences, read_evaluations, run_row
from prefopt.eval.numbers import number
from prefopt.eval.report import write_page
from prefopt.eval.report_evaluations import cell, early_ends, missing
from prefopt.eval.run_folder import Run, read_run


def compare_runs(folders: Sequence[str], out: str | None = None) -> dict[str, Any]:
    """Puts the last evaluations of runs beside each other.

    Args:
        folders: Of the runs.
        out: Folder for a page with plots, `report.html`; None writes nothing.

    Returns:
        `runs`, by name what :func:`prefopt.eval.evaluations.run_row` tells of each; `missing`, how
        to get what is not known; `warnings`, why win rates must not be compared; `remarks` on what
        could not be read; and `report`, the path of the page or None.

    Raises:
        PrefoptError: A folder is no run or stands twice, or `out` is one of the runs.
    """
    remarks: list[str] = []
    runs = _read(folders, remarks)
    evaluations = {name: read_evaluations(run, remarks) for name, run in runs.items()}
    rows = {name: run_row(run, evaluations[name]) for name, run in runs.items()}
    report = None
    if out is not None:
        if Path(out).resolve() in [run.folder for run in runs.values()]:
            raise PrefoptError(
                f"--out: {out} is one of the runs, whose own report.html it would replace; "
                "give another folder"
            )
        title = f"{len(runs)} runs compared" if len(runs) > 1 else next(iter(runs))
        report = str(write_page(Path(out), title, runs, {}, [], list(remarks), compared=True))
    return {
        "runs": rows,
        "missing": missing(rows),
        "warnings": differences(runs, evaluations),
        "remarks": remarks,
        "report": report,
    }


def print_comparison(result: Mapping[str, Any]) -> None:
    """Shows a comparison as a table on stdout, and what to beware of on stderr."""
    rows = result["runs"]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", overflow="fold", min_width=14)
    for head in ("win rate, %", "LC, %", "KL", "length", "steps", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [cell(key, row, "missing") for key in ("win_rate", "lc_win_rate")]
        late = "*" if "kl_step" in row else ""
        cells.append(number(row["kl"]) + late if "kl" in row else "missing")
        own, base = (row.get(key) for key in ("mean_length", "baseline_mean_length"))
        before = f" ({base:.0f})" if base is not None else ""
        cells.append(f"{own:.0f}{before}" if own is not None else "missing")
        cells += [cell(key, row, "missing") for key in ("steps", "seconds")]
        table.add_row(Text(name), *cells)
    Console(markup=False).print(table)
    print("length: characters (the baseline's); LC: length-controlled win rate; KL: nats")
    for name, row in rows.items():
        if "kl_step" in row:
            print(f"* {name}: the KL is of step {row['kl_step']:.0f}, the last that was logged")
    for note in [*early_ends(rows), *result["missing"]]:
        print(note)
    for sentence in [*result["remarks"], *(f"WARNING: {text}" for text in result["warnings"])]:
        print(sentence, file=sys.stderr)
    if result["report"] is not None:
        print(result["report"])


def _read(folders: Sequence[str], remarks: list[str]) -> dict[str, Run]:
    """Runs by the name of their folder, with that above it where folders are named alike."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    runs: dict[str, Run] = {}
    for given, path in zip(folders, paths, strict=True):
        if not path.is_dir():
            raise PrefoptError(f"{given}: no such folder: give the folder of a run")
        run = read_run(path, remarks)
        if run is None:
            raise PrefoptError(
                f"{given}: not a run: expected metrics.jsonl, recipe.yaml or evaluations/ in it "
                "(`prefopt report` takes a folder of runs)"
            )
        if paths.count(path) > 1:
            raise PrefoptError(f"{given}: stands twice among the runs; give each once")
        alone = names.count(path.name) == 1
        runs[path.name if alone else f"{path.parent.name}/{path.name}"] = run
    return runs
