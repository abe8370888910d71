"""Runs that are killed again and again until they are done: SIGKILL, and SIGTERM (pre-emption)."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

from run_folders import PHASES, Stamp, checkpoint_stamps, phase, stamps

from faults.runs import (
    CASES,
    Bench,
    Ended,
    Moment,
    Run,
    command_line,
    differences,
    leftovers,
    lines_of_log,
    random_moment,
    scaled,
    step_of_checkpoint,
    trainer_of,
)
from faults.table import Event, Fault, counts, fault, phases
from prefopt.trainers.checkpoints import step_of

PREEMPTED = 75
KILLS = 8  # of each case on each clock
PREEMPTIONS = 2  # likewise
OWED = 100  # of all
FROM_THE_SHELL = 3  # kills of each of these, started by the full command line
SHELL_CASES = ("dpo", "inpo", "ppo")


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every series of kills, each for a process of its own."""
    found: list[Callable[[], list[Event]]] = []
    for case in bench.whole:
        for clock in ("time", "writes"):
            for kind, number in (("SIGKILL", KILLS), ("SIGTERM", PREEMPTIONS)):
                times = scaled(number, scale)
                found.append(partial(series, bench, case, kind, clock, times))
    for case in [case for case in SHELL_CASES if case in bench.whole]:
        times = scaled(FROM_THE_SHELL, scale)
        found.append(partial(series, bench, case, "command line", "time", times))
    return found


def rows(events: Sequence[Event]) -> list[Fault]:
    """A row for the kills of each trainer, for those of the full command line, for pre-emptions."""
    killed = [event for event in events if event.kind == "SIGKILL"]
    missed = ", ".join(f"no {name}" for name in phases_missed(killed))
    note = "; ".join(filter(None, (phases(killed), missed)))
    found = [fault("killed: all trainers", killed, note)]
    for trainer in dict.fromkeys(trainer_of(event.case) for event in killed):
        own = [event for event in killed if trainer_of(event.case) == trainer]
        found.append(fault(f"killed: {trainer}", own, phases(own)))
    for kind, name in (
        ("command line", "killed: `python -m prefopt train`"),
        ("SIGTERM", "pre-empted (SIGTERM)"),
    ):
        own = [event for event in events if event.kind == kind]
        outcomes = "" if kind == "command line" else f"{counts(e.outcome for e in own)}; "
        found.append(fault(name, own, outcomes + phases(own)))
    return found


def phases_missed(events: Iterable[Event]) -> list[str]:
    """The phases that no kill has met."""
    return [name for name in PHASES if name not in {event.phase for event in events}]


def wanting(events: Sequence[Event]) -> list[str]:
    """Says so where there were too few kills, or none of a trainer, or none in a phase."""
    killed = [event for event in events if event.kind == "SIGKILL"]
    few = [f"{len(killed)} kills, expected {OWED}"] if len(killed) < OWED else []
    met = {trainer_of(event.case) for event in killed}
    few += [f"no kill of {name}" for name in sorted({*map(trainer_of, CASES)} - met)]
    return few + [f"no kill while {name}" for name in phases_missed(killed)]


def series(bench: Bench, case: str, kind: str, clock: str, kills: int) -> list[Event]:
    """Kills runs of a case until so many kills have landed; every run is finished.

    Args:
        bench: What faults are injected into.
        case: The run.
        kind: ``SIGKILL``, ``SIGTERM``, or ``command line`` (SIGKILL to a process that imports).
        clock: On which moments are drawn, see :func:`faults.runs.random_moment`.
        kills: How many.
    """
    chance = Random(f"{bench.seed} {case} {kind} {clock}")
    found: list[Event] = []
    while len(found) < kills:
        run = bench.folder / "killed" / f"{case}-{kind}-{clock}-{len(found)}".replace(" ", "-")
        found += until_done(bench, case, kind, clock, kills - len(found), run, chance)
    return found


def until_done(
    bench: Bench, case: str, kind: str, clock: str, kills: int, run: Path, chance: Random
) -> list[Event]:
    """Kills one run at most so many times, until it is done, and says what was lost."""
    found: list[Event] = []
    known: dict[str, Stamp] = {}
    saved: dict[Path, Stamp] = {}
    ended = None
    while len(found) < kills:
        process, reached = begin(bench, case, kind, clock, run, chance)
        if kind == "SIGTERM":
            process.stop()  # it goes on after the signal, and what it was at would be gone
        elif reached:
            process.kill()
        at = phase(run, process.began, bench.whole[case].run)
        if kind == "SIGTERM":
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)
        ended = process.wait()
        if ended.code == 0:
            break
        lost = made_again(run, known, saved) + end_of(kind, case, ended, run, at, reached)
        found.append(Event(kind, case, at, f"exit {ended.code}", lost=tuple(lost)))
        known, saved = stamps(run), checkpoint_stamps(run)
    if ended is None or ended.code:
        ended = bench.finish(case, run)
    if not found:  # its moments all came too late
        shutil.rmtree(run)
        return []
    lost = [] if ended.code else differences(run, bench.whole[case].run) + leftovers(run)
    if ended.code:
        lost.append(f"the run does not end: {ended}")
    lost += made_again(run, known, saved)
    if not any(lost) and not any(event.lost for event in found):
        shutil.rmtree(run)
    found[-1] = replace(found[-1], lost=(*found[-1].lost, *lost))
    return found


def made_again(run: Path, known: dict[str, Stamp], saved: dict[Path, Stamp]) -> list[str]:
    """What was on disk when a process was killed and is not as it was, now that another has run.

    Args:
        run: The run folder.
        known: What is written once, then.
        saved: The complete checkpoints, then. They may be rotated away, but not written again.
    """
    kept, there = stamps(run), checkpoint_stamps(run)
    lost = [f"{name} was made again" for name in known if kept.get(name) != known[name]]
    step = max(map(step_of, saved), default=0)
    if max(map(step_of, there), default=0) < step:
        lost.append(f"the checkpoint of step {step} is gone")
    early = [path for path in there if step_of(path) <= step and there[path] != saved.get(path)]
    return lost + [f"{path.name} was written again" for path in early]


def begin(
    bench: Bench, case: str, kind: str, clock: str, run: Path, chance: Random
) -> tuple[Run, bool]:
    """Starts a run and waits for a random moment; says whether that came before its end."""
    whole = bench.whole[case]
    if kind == "command line":
        process = command_line(bench.command(case, run), bench.log(run))
        return process, process.reach(Moment(bench.imports + chance.uniform(0, whole.seconds)))
    moment = random_moment(chance, whole, clock)
    process = bench.start(case, run, moment.write)
    return process, process.reach(moment)


def end_of(kind: str, case: str, ended: Ended, run: Path, at: str, reached: bool) -> list[str]:
    """What is wrong with how a process ended, and with what it had saved by then."""
    if not reached:
        return [f"before it was killed: {ended}"]
    if kind != "SIGTERM":
        return [] if ended.code == -signal.SIGKILL else [f"killed, but {ended}"]
    if at == "loading" and ended.code == -signal.SIGTERM:
        return []  # nothing was computed yet
    if ended.code != PREEMPTED:
        return [f"expected exit {PREEMPTED} after SIGTERM: {ended}"]
    if case == "mirror_prox":
        return []  # while a half step is prepared its model is not that of the last step
    steps = [line["step"] for line in lines_of_log(run) if "loss" in line]
    saved = step_of_checkpoint(run)
    if steps and saved != max(steps):
        return [f"step {max(steps)} was taken but the checkpoint is of step {saved}"]
    return []
