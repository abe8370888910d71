"""Two processes on one run folder: one of them is refused, and the other ends as if alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from faults.runs import Bench, Moment, differences, leftovers, random_moment, scaled
from faults.table import Event, Fault, counts, fault

TIMES = 2  # of each case
ATTEMPTS = 5  # at a pair: the first may have ended before the second came


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every pair of processes."""
    times = scaled(TIMES, scale)
    return [partial(together, bench, case, n) for case in bench.whole for n in range(times)]


def rows(events: Sequence[Event]) -> list[Fault]:
    """One row."""
    note = f"the second process: {counts(event.outcome for event in events)}"
    return [fault("two processes on one run folder", events, note)]


def wanting(events: Sequence[Event]) -> list[str]:
    """Nothing is owed."""
    return []


def together(bench: Bench, case: str, number: int) -> list[Event]:
    """Starts a run, and the same run again while it goes on; the first time at once."""
    chance = Random(f"{bench.seed} {case} lock {number}")
    for attempt in range(ATTEMPTS):
        run = bench.folder / "locked" / f"{case}-{number}-{attempt}"
        moment = random_moment(chance, bench.whole[case], "time") if number else Moment(0)
        if event := pair(bench, case, run, moment):
            return [event]
    return []


def pair(bench: Bench, case: str, run: Path, moment: Moment) -> Event | None:
    """Starts a run twice, the second time at a moment; None if the first was over by then."""
    whole, first = bench.whole[case], bench.start(case, run)
    if not first.reach(moment):
        first.wait()
        return None
    second = bench.start(case, run)
    ends = [second.wait(), first.wait()]
    refused = [end for end in ends if end.refusal() and str(run) in end.stderr]
    done = [end for end in ends if end.code == 0]
    if len(done) == len(ends) and "is complete" in ends[0].stderr:
        return None
    lost = []
    if not done:
        lost.append(f"neither ended: {ends[0]}; {ends[1]}")
    elif len(refused) != 1:
        lost.append(f"both ran: {ends[0]}; {ends[1]}")
    if done:
        lost += differences(run, whole.run) + leftovers(run)
    outcome = "one refused in one line" if refused else "not refused"
    return Event("lock", case, "", outcome, lost=tuple(lost))
