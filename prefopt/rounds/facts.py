"""What a folder says of itself: the version of its format, and the facts that must not change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt import __version__
from prefopt.errors import PrefoptError

FORMAT = 1  # of run folders, rounds, evaluations and checkpoints; those without one are older


def check_format(path: Path, found: Mapping[str, Any]) -> None:
    """Refuses what a later version has written; older formats are read.

    Args:
        path: Where ``found`` was read.
        found: Plain values, with ``format`` unless they are older.

    Raises:
        PrefoptError: The format is newer than this version's.
    """
    version = found.get("format", 0)
    if not isinstance(version, int) or version > FORMAT:
        raise PrefoptError(
            f"{path}: written by a newer prefopt (format {version}; prefopt {__version__} reads up "
            f"to {FORMAT}); upgrade prefopt, or choose another run_dir"
        )


def read_facts(path: Path, otherwise: str) -> dict[str, Any]:
    """The facts in a file that is there.

    Args:
        path: The file.
        otherwise: What to do where it cannot be read, for the error.

    Raises:
        PrefoptError: It cannot be read, or a newer version has written it.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        check_format(path, found)
    except (ValueError, AttributeError) as error:
        raise PrefoptError(f"{path}: cannot be read ({error}); {otherwise}") from error
    return found


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], at: str = ""
) -> Iterator[tuple[str, str]]:
    """Every value that is not the same, as its key and ``old -> new``; the keys in order.

    >>> list(differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": None}))
    [('a.b', '1 -> 2')]
    """
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{at}{key}.")
        elif before != after:
            yield f"{at}{key}", f"{_short(before)} -> {_short(after)}"


def listed(different: Mapping[str, str]) -> str:
    """Differences on one line."""
    return ", ".join(f"{key}: {change}" for key, change in sorted(different.items()))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
