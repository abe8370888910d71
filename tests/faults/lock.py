"""Two processes on one run folder: one of them is refused, and the other ends as if alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random

from faults.runs import Bench, Moment, differences, leftovers, random_moment, scaled
from faults.table import Event, Fault, counts, fault

TIMES = 2  # of each case


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every pair of processes."""
    times = scaled(TIMES, scale)
    return [partial(together, bench, case, n) for case in bench.whole for n in range(times)]


def rows(events: Sequence[Event]) -> list[Fault]:
    """One row."""
    note = f"the second process: {counts(event.outcome for event in events)}"
    return [fault("two processes on one run folder", events, note)]


def together(bench: Bench, case: str, number: int) -> list[Event]:
    """Starts a run, and the same run again while it goes on; the first time at once."""
    chance = Random(f"{bench.seed} {case} lock {number}")
    run, whole = bench.folder / "locked" / f"{case}-{number}", bench.whole[case]
    moment = random_moment(chance, whole, "time") if number else Moment(0)
    first = bench.start(case, run)
    if not first.reach(moment):
        return []
    second = bench.start(case, run)
    ends = [second.wait(), first.wait()]
    refused = [end for end in ends if end.refusal() and str(run) in end.stderr]
    done = [end for end in ends if end.code == 0]
    lost = []
    if not done:
        lost.append(f"neither ended: {ends[0]}; {ends[1]}")
    elif len(refused) != 1 and ends[0].stderr.count("is complete") == 0:
        lost.append(f"both ran: {ends[0]}; {ends[1]}")
    if done:
        lost += differences(run, whole.run) + leftovers(run)
    outcome = "one refused in one line" if refused else "not refused"
    return [Event("lock", case, "", outcome, lost=tuple(lost))]
