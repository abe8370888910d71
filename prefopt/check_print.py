"""What :func:`prefopt.check.check` found, for people: tables, one example in colour, findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.data.findings import ORDER
from prefopt.memory import size

COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
LOSS, SPECIAL = ("\u27e6", "\u27e7"), ("\u27e8", "\u27e9")  # the marks of what colours say too
_SHOWN = 1200  # characters of a piece of the example that are printed


def print_check(result: Mapping[str, Any]) -> None:
    """Shows the result of a check; what is wrong comes last, where it is seen."""
    console = Console(highlight=False)
    for part in ("train", "evaluation"):
        if part in result:
            _print_report(console, part, result[part])
    if "length_bias" in result:
        _print_length_bias(console, result["length_bias"])
    if "rounds" in result:
        rounds, samples = result["rounds"], result["samples"]
        each = " to ".join(f"{n:,}" for n in sorted({min(rounds), max(rounds)}))
        console.print(f"{len(rounds):,} rounds of {each} prompts, {samples} samples each")
    if "win_rate" in result:
        _print_win_rate(console, result["win_rate"])
    if "memory" in result:
        _print_memory(console, result["memory"])
    if "budget" in result:
        _print_budget(console, result["budget"])
    if "train" in result:
        _print_example(console, result["train"]["example"])
    _print_findings(console, result["findings"])


def _print_findings(console: Console, findings: Sequence[Mapping[str, Any]]) -> None:
    console.print()
    for finding in findings:
        severity, count = finding["severity"], finding["count"]
        many = f", {count:,} times" if count > 1 else ""
        head = Text(f"{severity}: ", COLOURS[severity])
        head.append(f"{finding['kind']}{many}", "bold")
        _say(console, head)
        if places := finding["where"]:
            more = f" and {count - len(places):,} more" if count > len(places) else ""
            _say(console, Text(f"  at {_places(places)}{more}"))
        _say(console, Text(f"  found: {finding['found']}"))
        _say(console, Text(f"  try: {finding['remedy']}", "green"))
    counts = {s: sum(finding["severity"] == s for finding in findings) for s in ORDER}
    told = [f"{n} {severity}{'s' * (n > 1)}" for severity, n in counts.items() if n]
    _say(console, Text(", ".join(told) or "nothing found", "bold"))


def _places(places: Sequence[str]) -> str:
    """Rows, each file named once in a row: a.jsonl:2, 7, b.jsonl:1."""
    told, last = [], ""
    for place in places:
        file, _, row = place.rpartition(":")
        told.append(row if file == last else place)
        last = file
    return ", ".join(told)


def _print_example(console: Console, example: Mapping[str, Any]) -> None:
    """One row as the model reads it; what colours say is said by marks too."""
    _say(console, Text.assemble("\n", ("example ", "bold"), example["where"]))
    legend = Text.assemble(
        (f"{LOSS[0]}bears loss{LOSS[1]}", "green"), "  ",
        (f"{SPECIAL[0]}special token{SPECIAL[1]}", "magenta"), "  ",
        ("the rest is only read", "dim"),
    )  # fmt: skip
    _say(console, legend)
    for name, pieces in example.items():
        if name != "where":
            _say(console, Text(name, "bold"))
            _say(console, rendered(pieces))


def rendered(pieces: Sequence[Mapping[str, Any]]) -> Text:
    """The pieces of an example with colours and marks, and nothing that moves a cursor."""
    text, inside = Text(), False
    for piece in pieces:
        loss = piece["loss"]
        if loss != inside:
            text.append(LOSS[0] if loss else LOSS[1], "green")
            inside = loss
        shown = visible(_shortened(piece["text"]))
        if piece["special"]:
            text.append(f"{SPECIAL[0]}{shown}{SPECIAL[1]}", "bold magenta" if loss else "magenta")
        else:
            text.append(shown, "green" if loss else "dim")
    if inside:
        text.append(LOSS[1], "green")
    return text


def visible(text: str) -> str:
    """Text with its line breaks, and all else that cannot be seen spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} [... {len(text) - _SHOWN:,} characters ...] {text[-half:]}"


def _say(console: Console, text: Text) -> None:
    """Prints text that may hold anything on a terminal that may not know all of it."""
    plain = text.plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(text if plain == text.plain else Text(plain), soft_wrap=True)


def _print_length_bias(console: Console, bias: Mapping[str, float]) -> None:
    console.print(
        f"chosen minus rejected: {bias['mean']:+.1f} tokens (standard error "
        f"{bias['standard_error']:.1f}); the longer answer is chosen in {bias['accuracy']:.1%} "
        f"(95 % interval {bias['low']:.1%} to {bias['high']:.1%})",
        soft_wrap=True,
    )


def _print_win_rate(console: Console, report: Mapping[str, Any]) -> None:
    every, unit = report["every"], report["unit"]
    console.print(
        f"win rate on {report['prompts']:,} prompts, {report['evaluations']:,} times "
        f"({'every ' + unit if every == 1 else f'every {every} {unit}s'}): "
        f"{report['answers']:,} answers, {report['comparisons']:,} comparisons"
    )


def _print_memory(console: Console, memory: Mapping[str, Any]) -> None:
    if "problem" in memory:
        _say(console, Text(f"no estimate of the memory: {memory['problem']}", "yellow"))
        return
    table = Table(title="memory a device")
    table.add_column("part")
    table.add_column("estimate", justify="right")
    for name, count in memory["parts"].items():
        if count:
            table.add_row(name, size(count))
    table.add_section()
    table.add_row("at the peak", size(memory["total"]))
    console.print(table)
    for note in memory["notes"]:
        _say(console, Text(note, "yellow"))
    precision = "bfloat16" if memory["machine"]["bf16"] else "float32"
    tokens = memory["micro_batch_tokens"]
    console.print(f"the largest micro-batch has {tokens:,} tokens; computed in {precision}")
    console.print(memory["verdict"], soft_wrap=True)


def _print_budget(console: Console, budget: Mapping[str, Any]) -> None:
    tokens = budget["tokens"]
    steps = budget["steps"]
    line = f"{steps:,} optimiser step{'s' * (steps != 1)} on about {tokens['trained']:,} tokens"
    if tokens["scored"]:
        line += f"; {tokens['scored']:,} read by frozen models"
    if tokens["generated"]:
        line += f"; up to {tokens['generated']:,} generated"
    console.print(line, soft_wrap=True)
    if "disk" in budget:
        line = f"disk: up to {size(budget['disk'])} of {size(budget['free'])} that are free"
        console.print(line)
    if budget["seconds"] is None:
        console.print(f"time: not estimated, {budget['time']}", soft_wrap=True)
        return
    console.print(
        f"time: in the order of {duration(budget['seconds'])}, as this {budget['device']} reaches "
        f"{budget['throughput'] / 1e12:.2g} TFLOP/s in a matrix product (docs/check.md)",
        soft_wrap=True,
    )


def duration(seconds: float) -> str:
    """One figure and a unit: an estimate of this kind has no second figure.

    >>> duration(17), duration(10_000), duration(1e6)
    ('20 s', '3 h', '10 days')
    """
    for unit, length, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 36)):
        if seconds < most * length:
            return f"{_one_figure(seconds / length)} {unit}"
    return f"{_one_figure(seconds / 86400)} days"


def _one_figure(value: float) -> str:
    return f"{float(f'{max(value, 1):.0e}'):.0f}"


def _print_report(console: Console, part: str, report: Mapping[str, Any]) -> None:
    table = Table(title=f"{part}: {report['rows']:,} rows")
    for column in ("tokens", "5 %", "50 %", "95 %", "99 %", "longest"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    for name, lengths in report["tokens"].items():
        table.add_row(name, *(f"{lengths[k]:,}" for k in ("p5", "p50", "p95", "p99", "max")))
    console.print(table)
    for reason, count in {**report["invalid"], **report["dropped"]}.items():
        console.print(f"left out: {count:,} ({reason.replace('_', ' ')})")
    if report["duplicates"]:
        console.print(f"duplicates: {report['duplicates']:,}")
