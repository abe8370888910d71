"""Fuzzed inputs: the targets of ``fuzz_targets``, each with as many as are asked for."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from functools import partial

from fuzz_targets import TARGETS, run_target

from faults.runs import Bench, scaled
from faults.table import Event, Fault

INPUTS = 10_000  # of each parser
FEWER = {"report": 500}  # no parser: it writes a page of what was read, in 0.2 s each


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every parser, each for a process of its own."""
    return [partial(fuzzed, name, scaled(owed(name), scale), bench.seed) for name in TARGETS]


def rows(events: Sequence[Event]) -> list[Fault]:
    """A row for each parser."""
    return [
        Fault(f"fuzzed input: {event.case}", event.count, len(event.lost), _note(event))
        for event in sorted(events, key=lambda event: list(TARGETS).index(event.case))
    ]


def _note(event: Event) -> str:
    return event.outcome + ("; no parser, but a writer of pages" if event.case in FEWER else "")


def wanting(events: Sequence[Event]) -> list[str]:
    """The parsers that were given too few inputs."""
    tried = {event.case: event.count for event in events}
    return [
        f"{name}: {tried.get(name, 0)} inputs, expected {owed(name)}"
        for name in TARGETS
        if tried.get(name, 0) < owed(name)
    ]


def owed(name: str) -> int:
    """How many inputs a target is to be given."""
    return FEWER.get(name, INPUTS)


def fuzzed(name: str, inputs: int, seed: int) -> list[Event]:
    """Gives a parser random inputs."""
    try:
        tried = run_target(name, inputs, seed)
    except Exception as error:  # noqa: BLE001 any kind of crash is what is looked for
        said = "".join(traceback.format_exception(error))[-4000:]  # its notes have the input
        return [Event("fuzz", name, "", "crashed", lost=(said,))]
    return [Event("fuzz", name, "", "no crash", count=tried)]
