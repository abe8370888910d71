"""How the report and the comparison of runs write numbers and what they are called."""

from __future__ import annotations

from prefopt.eval.run_folder import is_number

# In the order of the table's columns.
LABELS = {
    "win_rate": "win rate, %",
    "lc_win_rate": "length-controlled win rate, %",
    "kl": "KL, nats",
    "mean_length": "mean length",
    "baseline_mean_length": "baseline's mean length",
    "exploitability": "exploitability, 0-0.5",
    "seconds": "time",
    "ece": "expected calibration error",
}


def label(key: str) -> str:
    """What a key of a summary is called on the page."""
    return LABELS.get(key, key.replace("_", " "))


def number(value: object) -> str:
    """Three digits that matter; whole numbers and thousands in full."""
    if isinstance(value, str):
        return value
    if not is_number(value):
        return "–"
    if isinstance(value, int) or abs(value) >= 1000 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"
    return f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def csv_cell(value: object) -> object:
    """A value, or text that no spreadsheet takes for a formula."""
    formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if formula else value
