"""Files and folders that are either complete or not there: written aside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefopt.errors import PrefoptError


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a folder beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: The folder to make; an existing one is replaced.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON escapes it.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def digest(value: Any) -> str:
    """The sha256 of plain values, in hexadecimal digits: what something is kept or known under."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_appended(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines to which lines are added one by one.

    What a killed process left of a last line is cut off, so that the next line begins as one.

    Raises:
        PrefoptError: A whole line is not a JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        atomic_write(path, whole)
    return [_object(line, f"{path}:{n}") for n, line in enumerate(whole.splitlines(), start=1)]


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (RecursionError, ValueError) as error:
        problem = str(error)
    else:
        if isinstance(found, dict):
            return found
        problem = f"it holds {found!r:.40}"
    raise PrefoptError(
        f"{where}: not a line of this file ({problem}), expected a JSON object; remove the line, "
        "and what it held is made again"
    )


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, at any depth."""
    for path in folder.rglob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync_tree(folder: Path) -> None:
    """Flushes a folder and all in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
