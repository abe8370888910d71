"""What was injected, what was lost, and the table that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from run_folders import PHASES

BEGIN, END = "<!-- faults -->", "<!-- end of faults -->"


@dataclass(frozen=True)
class Event:
    """One injected fault.

    Attributes:
        kind: What was injected.
        case: The run it met, or the parser.
        phase: What the run was at.
        outcome: What the run made of it.
        said: The error it ended with, if it did.
        lost: What was lost, line by line; must be empty.
        count: How many faults this stands for.
    """

    kind: str
    case: str
    phase: str
    outcome: str
    said: str = ""
    lost: tuple[str, ...] = ()
    count: int = 1


@dataclass(frozen=True)
class Fault:
    """A row of the table: how often a fault was injected, and how often something was lost."""

    name: str
    injected: int
    lost: int
    note: str


def fault(name: str, events: Sequence[Event], note: str) -> Fault:
    """The row of some events."""
    return Fault(name, len(events), sum(bool(event.lost) for event in events), note)


def counts(values: Iterable[str], order: Sequence[str] = ()) -> str:
    """How often each value occurs, as text: ``training 12, loading 3``.

    Examples:
        >>> counts(["a", "b", "a"])
        'a 2, b 1'
    """
    found = Counter(values)
    names = [name for name in order if name in found] or [name for name, _ in found.most_common()]
    return ", ".join(f"{name} {found[name]}" for name in names)


def phases(events: Iterable[Event]) -> str:
    """How many events met each phase."""
    return counts((event.phase for event in events), PHASES)


def markdown(rows: Sequence[Fault]) -> str:
    """The table as Markdown."""
    lines = ["| fault | injected | lost | |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.injected:,} | {row.lost} | {row.note} |" for row in rows]
    return "\n".join(lines)


def write_page(page: Path, text: str) -> None:
    """Puts a text between the markers of a page."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def show(rows: Sequence[Fault]) -> None:
    """Prints the table."""
    table = Table("fault", "injected", "lost", "")
    for row in rows:
        table.add_row(row.name, f"{row.injected:,}", str(row.lost), row.note)
    Console().print(table)
