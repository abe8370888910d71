"""``python -m faults``: injects every kind of fault and counts what was lost (``make faults``)."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()

import torch  # noqa: E402

from faults import corruption, disk, kills, lock, table  # noqa: E402
from faults.runs import CASES, Bench, prepare, run_whole  # noqa: E402
from prefopt.cli import quiet_libraries  # noqa: E402
from prefopt.run_folder import environment  # noqa: E402

IMPORTS = time.perf_counter() - BEGUN
ROOT = Path(__file__).parents[2]
KINDS: dict[str, Any] = {
    "kills": kills,
    "disk": disk,
    "corruption": corruption,
    "lock": lock,
}
if find_spec("fuzz_targets"):
    from faults import fuzzing

    KINDS["fuzzing"] = fuzzing


def main() -> int:
    """Injects what is asked for; 1 if anything was lost, or less was injected than is owed."""
    options = parse()
    become_root()
    torch.set_num_threads(1)
    quiet_libraries()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as folder:
        found, broken = inject(Path(folder), options)
    made = {
        "seed": options.seed,
        "scale": options.scale,
        "cases": options.cases,
        "seconds": round(time.perf_counter() - begun),
        **environment(),
        "uncommitted": uncommitted(),
    }
    whole = options.scale >= 1 and options.cases == list(CASES)
    result = {
        kind: {
            **made,
            "faults": [asdict(row) for row in KINDS[kind].rows(events)],
            "errors": sorted({event.said for event in events if event.said}),
            "broken": broken[kind],
            "wanting": KINDS[kind].wanting(events) if whole else [],
            "losses": [asdict(event) for event in events if event.lost],
        }
        for kind, events in found.items()
    }
    bad = [kind[what] for kind in result.values() for what in ("losses", "broken", "wanting")]
    if options.output:
        result = {**earlier(options), **result}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        table.Fault(**row) for kind in KINDS if kind in result for row in result[kind]["faults"]
    ]
    if options.page:
        table.write_page(options.page, f"{heading(result)}\n\n{table.markdown(rows)}")
    table.show(rows)
    print(json.dumps(bad, indent=2))
    return int(any(bad))


def inject(
    folder: Path, options: argparse.Namespace
) -> tuple[dict[str, list[table.Event]], dict[str, list[str]]]:
    """All events, and what went wrong with the injecting itself, by kind; up to an interrupt."""
    found: dict[str, list[table.Event]] = {kind: [] for kind in options.only}
    broken: dict[str, list[str]] = {kind: [] for kind in options.only}
    prepare(folder)
    bench = Bench(folder, {}, options.seed, IMPORTS)
    cases = [] if options.only == ["fuzzing"] else options.cases
    with ProcessPoolExecutor(options.lanes, multiprocessing.get_context("fork")) as lanes:
        try:
            wholes = lanes.map(run_whole, [bench] * len(cases), cases)
            bench = replace(bench, whole=dict(zip(cases, wholes, strict=True)))
            print(*bench.whole.values(), sep="\n", file=sys.stderr)
            jobs = {
                lanes.submit(job): kind
                for kind in reversed(options.only)  # parsers take longest
                for job in KINDS[kind].jobs(bench, options.scale)
            }
            for done in as_completed(jobs):
                if error := done.exception():
                    broken[jobs[done]].append("".join(traceback.format_exception(error)))
                else:
                    found[jobs[done]] += done.result()
        except KeyboardInterrupt:
            print("interrupted: the result is of what was done by then", file=sys.stderr)
            for lane in multiprocessing.active_children():
                lane.terminate()
        finally:
            lanes.shutdown(wait=False, cancel_futures=True)
    return found, broken


def become_root() -> None:
    """Starts again as root of a namespace of its own, where small disks can be mounted."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if os.geteuid() == 0 or shutil.which(unshare[0]) is None:
        return
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0:
        os.execvp(unshare[0], [*unshare, sys.executable, "-m", "faults", *sys.argv[1:]])


def names(text: str) -> list[str]:
    """The words between commas."""
    return text.split(",")


def earlier(options: argparse.Namespace) -> dict[str, Any]:
    """What is in the file for the result of kinds that are not injected now."""
    kinds = set(options.only) != set(KINDS) and options.output.exists()
    return json.loads(options.output.read_text()) if kinds else {}


def uncommitted() -> list[str]:
    """The files of this checkout that are not as its commit has them; results and pages apart."""
    command = ["git", "status", "--porcelain", "--", ":!benchmarks/results", ":!docs"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return [line[3:] for line in found.stdout.splitlines()]


def heading(result: dict[str, Any]) -> str:
    """What the numbers were made with, in a sentence for each start of this program."""
    starts: dict[str, list[str]] = {}
    for kind in (kind for kind in KINDS if kind in result):
        starts.setdefault(_made_with(result[kind]), []).append(kind)
    if len(starts) == 1:
        return next(iter(starts))
    return "\n".join(f"- {', '.join(kinds)}: {text}" for text, kinds in starts.items())


def _made_with(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "transformers"))
    changed = f" with changes to {', '.join(made['uncommitted'])}" if made["uncommitted"] else ""
    return (
        f"{made['date'][:10]}, commit {(made['commit'] or 'unknown')[:12]}{changed}, "
        f"{made['device']}, Python {made['python']}, {versions}, seed {made['seed']}, "
        f"{made['seconds'] / 60:.0f} minutes."
    )


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=names, default=list(KINDS), help="kinds, comma-separated")
    parser.add_argument("--cases", type=names, default=list(CASES), help="runs, likewise")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults to inject")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    parser.add_argument("--lanes", type=int, default=2, help="processes at a time")
    parser.add_argument("--folder", type=Path, help="where runs go; default: that of the system")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
