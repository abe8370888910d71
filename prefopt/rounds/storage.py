"""Files and folders that are either complete or not there: written aside, synced, renamed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefopt.disk import writing

logger = logging.getLogger(__name__)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a folder beside ``path`` that takes its place when the block ends without an error.

    Args:
        path: The folder to make; an existing one is replaced.
    """
    partial = _aside(path)
    try:
        with writing(path, path.name):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Flushes a folder and renames it; one that has the name already is there until then."""
    sync_tree(partial)
    old = path.with_name(f".{path.name}.partial-old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        partial.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Deletes a folder; a process killed meanwhile leaves nothing that looks whole."""
    aside = _aside(path)
    path.rename(aside)
    _sync(path.parent)
    shutil.rmtree(aside)


def atomic_write(path: Path, content: str | bytes, *, sync_name: bool = True) -> None:
    """Writes a file so that a reader finds the old content or the new, never a part.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON escapes it.

    Args:
        path: The file.
        content: Text or bytes.
        sync_name: Whether its name is flushed too; not where another file's in the same folder is
            right after.

    Raises:
        PrefoptError: The disk is full.
    """
    partial = _aside(path)
    try:
        with writing(path, path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(as_bytes(content))
            _sync(partial)
            partial.replace(path)
            if sync_name:
                _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def as_bytes(content: str | bytes) -> bytes:
    """What `atomic_write` writes."""
    if isinstance(content, str):
        return content.encode(errors="backslashreplace")
    return content


def digest(value: Any) -> str:
    """The sha256 of plain values, in hexadecimal digits: what something is kept or known under."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def append(path: Path, lines: str) -> None:
    """Adds whole lines to a file: all of them or, where that fails, none.

    Raises:
        PrefoptError: The disk is full.
    """
    with writing(path, path.name), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = as_bytes(lines)
        try:
            while rest:  # a disk that is almost full takes a part
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(end)
            raise


def read_appended(path: Path, **columns: type) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines to which lines are added one by one.

    What is no whole line, such as the last one of a killed process, or lacks a column is cut out,
    so that the next line begins as one; what it said is for the caller to make again.

    Args:
        path: The file; one that is not there has no objects.
        columns: What every object has, and of which type.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    values, whole = [], []
    for number, line in enumerate(lines, start=1):
        value = _object(line)
        if value is None or not all(isinstance(value.get(c), t) for c, t in columns.items()):
            what = ", ".join(columns)
            what = f"JSON object with {what}" if what else "JSON object"
            logger.warning("%s:%d: found no %s; the line is taken out", path, number, what)
        else:
            values.append(value)
            whole.append(line)
    if rest or len(whole) < len(lines):
        atomic_write(path, b"".join(line + b"\n" for line in whole))
    return values


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (RecursionError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remove_partial(folder: Path) -> None:
    """Removes what killed processes left half-written in a folder, at any depth."""
    for path in folder.rglob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Flushes a folder and all in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
