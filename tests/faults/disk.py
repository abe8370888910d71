"""Full disks: run folders on small file systems that fill up by themselves, or are filled."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from run_folders import Stamp, phase, stamps

from faults.runs import (
    Bench,
    Ended,
    differences,
    leftovers,
    random_moment,
    scaled,
    step_of_checkpoint,
)
from faults.table import Event, Fault, counts, fault, phases

EVENTS = 3  # of each case
OWED = 20  # of all
MIB = 2**20
PAGE = 4096
ATTEMPTS = 5  # at an event: what is left of a disk may be enough for what is left of a run


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every full disk, each for a process of its own; none where nothing can be mounted."""
    if not can_mount(bench.folder):
        return []
    times = scaled(EVENTS, scale)
    return [
        partial(full_disk, bench, case, i + n)  # so that few of them are of both kinds too
        for i, case in enumerate(bench.whole)
        for n in range(times)
    ]


def rows(events: Sequence[Event]) -> list[Fault]:
    """A row for disks that were too small, one for disks that were filled."""
    if not events:
        return [Fault("full disk", 0, 0, "skipped: `mount -t tmpfs` needs root")]
    found = []
    for kind in ("disk too small", "disk filled"):
        own = [event for event in events if event.kind == kind]
        found.append(fault(kind, own, f"{counts(e.outcome for e in own)}; {phases(own)}"))
    return found


def wanting(events: Sequence[Event]) -> list[str]:
    """Says so where too few disks were full."""
    return [f"{len(events)} full disks, expected {OWED}"] if len(events) < OWED else []


def can_mount(folder: Path) -> bool:
    """Whether small file systems can be had."""
    try:
        with small_disk(folder / "can-mount", MIB):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_room(folder: Path) -> None:
    """Frees space: the disk grows, and what filled it goes."""
    (folder / "filler").unlink(missing_ok=True)
    command = ["mount", "-o", "remount,size=1g", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def full_disk(bench: Bench, case: str, number: int) -> list[Event]:
    """Lets a run meet a full disk, frees space, and has the same command finish it."""
    chance = Random(f"{bench.seed} {case} disk {number}")
    kind, meet = (("disk too small", too_small), ("disk filled", filled))[number % 2]
    for attempt in range(ATTEMPTS):
        disk = bench.folder / "disks" / f"{case}-{number}-{attempt}"
        size = needed(bench.whole[case].run)
        size = int(size * chance.uniform(0.02, 0.98)) if kind == "disk too small" else 4 * size
        with small_disk(disk, size):
            met = meet(bench, case, disk / "run", chance)
            if met is not None:
                lost = what_is_lost(bench, case, disk / "run", met)
                said = met.ended.refusal() or ""
                return [Event(kind, case, met.phase, outcome(met.ended), said, tuple(lost))]
    return []


def needed(run: Path) -> int:
    """Bytes that the files of a run take, in whole pages."""
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


@dataclass(frozen=True)
class Met:
    """A full disk that a run has met.

    Attributes:
        ended: How its process ended.
        phase: What it was at when the disk was filled, or when it ended.
        known: The stamps of what was on disk when the disk was filled.
        step: The step of the last complete checkpoint then.
    """

    ended: Ended
    phase: str
    known: dict[str, Stamp]
    step: int


def too_small(bench: Bench, case: str, run: Path, chance: Random) -> Met:
    """Runs on a disk that cannot hold the whole of it."""
    process = bench.start(case, run)
    ended = process.wait()
    return Met(ended, phase(run, process.began, bench.whole[case].run), {}, 0)


def filled(bench: Bench, case: str, run: Path, chance: Random) -> Met | None:
    """Fills the disk at a random moment, up to a few bytes or many; None if that was too late."""
    moment = random_moment(chance, bench.whole[case], chance.choice(("time", "writes")))
    process = bench.start(case, run, moment.write)
    if not process.reach(moment):
        process.wait()
        return None
    process.stop()  # nothing is written while what is there is looked at
    at, known = phase(run, process.began, bench.whole[case].run), stamps(run)
    step = step_of_checkpoint(run)
    left = chance.choice((0, chance.randint(0, 16) * PAGE, chance.randint(0, MIB)))
    taken = shutil.disk_usage(run.parent).free - left
    with (run.parent / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(PAGE, taken))
    process.send(signal.SIGCONT)
    ended = process.wait()
    return None if ended.code == 0 else Met(ended, at, known, step)


def what_is_lost(bench: Bench, case: str, run: Path, met: Met) -> list[str]:
    """Looks at what is there, frees space, finishes the run, and compares."""
    lost = [] if met.ended.refusal() else [f"expected one line of error and exit 2: {met.ended}"]
    kept, step = stamps(run), step_of_checkpoint(run)
    lost += [
        f"{name} is gone or new" for name, stamp in met.known.items() if kept.get(name) != stamp
    ]
    if step < met.step:
        lost.append(f"the checkpoint of step {met.step} is gone, the last is of step {step}")
    make_room(run.parent)
    ended = bench.finish(case, run)
    if ended.code:
        return [*lost, f"with space freed the run does not end: {ended}"]
    again = stamps(run)
    lost += [f"{name} was made again" for name in kept if again.get(name) != kept[name]]
    return lost + differences(run, bench.whole[case].run) + leftovers(run)


def outcome(ended: Ended) -> str:
    """How a process ended, in a word or two."""
    return "one line of error" if ended.refusal() else f"exit {ended.code}"
