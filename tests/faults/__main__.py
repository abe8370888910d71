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
LANES = 2  # processes at a time that faults are injected into


def main() -> int:
    """Injects what is asked for; 1 if anything was lost."""
    options = parse()
    become_root()
    torch.set_num_threads(1)
    quiet_libraries()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as folder:
        found, broken = inject(Path(folder), options)
    rows = [row for kind, events in found.items() for row in KINDS[kind].rows(events)]
    result = {
        "seed": options.seed,
        "scale": options.scale,
        "seconds": round(time.perf_counter() - begun),
        **environment(),
        "faults": [asdict(row) for row in rows],
        "errors": sorted({e.said for events in found.values() for e in events if e.said}),
        "broken": broken,
        "losses": [asdict(e) for events in found.values() for e in events if e.lost],
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    if options.page:
        table.write_page(options.page, f"{heading(result)}\n\n{table.markdown(rows)}")
    table.show(rows)
    print(json.dumps([result["losses"], broken], indent=2))
    return int(bool(result["losses"] or broken))


def inject(
    folder: Path, options: argparse.Namespace
) -> tuple[dict[str, list[table.Event]], list[str]]:
    """All events, by kind, and what went wrong with the injecting itself."""
    prepare(folder)
    bench, cases = Bench(folder, {}, options.seed, IMPORTS), options.cases
    with ProcessPoolExecutor(LANES, multiprocessing.get_context("fork")) as lanes:
        try:
            wholes = lanes.map(run_whole, [bench] * len(cases), cases)
            bench = replace(bench, whole=dict(zip(cases, wholes, strict=True)))
            print(*bench.whole.values(), sep="\n", file=sys.stderr)
            jobs = {
                lanes.submit(job): kind
                for kind in reversed(options.only)  # parsers take longest
                for job in KINDS[kind].jobs(bench, options.scale)
            }
            found: dict[str, list[table.Event]] = {kind: [] for kind in options.only}
            broken = []
            for done in as_completed(jobs):
                if error := done.exception():
                    broken.append("".join(traceback.format_exception(error)))
                else:
                    found[jobs[done]] += done.result()
            return found, broken
        finally:
            lanes.shutdown(wait=False, cancel_futures=True)


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


def heading(result: dict[str, Any]) -> str:
    """What the numbers were made with, in a sentence."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"{result['date'][:10]}, commit {(result['commit'] or 'unknown')[:12]}, "
        f"{result['device']}, Python {result['python']}, {versions}, seed {result['seed']}, "
        f"{result['seconds'] / 60:.0f} minutes."
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
    parser.add_argument("--folder", type=Path, help="where runs go; default: that of the system")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
