"""``python -m faults``: injects every kind of fault and counts what was lost (``make faults``)."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
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
    torch.set_num_threads(1)
    quiet_libraries()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=options.folder) as folder:
        found = inject(Path(folder), options)
    rows = [row for kind, events in found.items() for row in KINDS[kind].rows(events)]
    result = {
        "seed": options.seed,
        "scale": options.scale,
        "seconds": round(time.perf_counter() - begun),
        **environment(),
        "faults": [asdict(row) for row in rows],
        "losses": [asdict(e) for events in found.values() for e in events if e.lost],
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    table.show(rows)
    print(json.dumps(result["losses"], indent=2))
    return int(bool(result["losses"]))


def inject(folder: Path, options: argparse.Namespace) -> dict[str, list[table.Event]]:
    """All events, by kind."""
    prepare(folder)
    bench, cases = Bench(folder, {}, options.seed, IMPORTS), options.cases
    with ProcessPoolExecutor(LANES, multiprocessing.get_context("fork")) as lanes:
        try:
            wholes = lanes.map(run_whole, [bench] * len(cases), cases)
            bench = replace(bench, whole=dict(zip(cases, wholes, strict=True)))
            print(*bench.whole.values(), sep="\n", file=sys.stderr)
            jobs = {
                lanes.submit(job): kind
                for kind in options.only
                for job in KINDS[kind].jobs(bench, options.scale)
            }
            found: dict[str, list[table.Event]] = {kind: [] for kind in options.only}
            for done in as_completed(jobs):
                found[jobs[done]] += done.result()
            return found
        finally:
            lanes.shutdown(wait=False, cancel_futures=True)


def names(text: str) -> list[str]:
    """The words between commas."""
    return text.split(",")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=names, default=list(KINDS), help="kinds, comma-separated")
    parser.add_argument("--cases", type=names, default=list(CASES), help="runs, likewise")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the faults to inject")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
