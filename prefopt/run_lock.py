"""One process at a time in the folder of a run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from prefopt.disk import writing
from prefopt.errors import PrefoptError

NAME = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds a run folder for as long as the block lasts, or until the process is killed.

    The lock is the operating system's, on ``.lock`` in the folder, which also says who holds it.
    A folder that was made for it, and in which nothing came to be, is taken away again.

    Args:
        folder: The run's, which may not be there yet.

    Raises:
        PrefoptError: Another process holds it.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PrefoptError(
            f"{folder}: {_holder(path)} works in this folder; wait until it has ended, or end it, "
            "or choose another run_dir"
        ) from None
    try:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"process": os.getpid(), "host": platform.node(), "since": since}
        with writing(path, NAME):
            path.write_text(json.dumps(facts) + "\n")
        yield
    finally:
        if new and os.listdir(folder) == [NAME]:
            path.unlink()
            folder.rmdir()
        lock.release()


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['process']} on {facts['host']} (since {facts['since']})"
    except (OSError, ValueError, KeyError):  # it is about to write them, or has just ended
        return "another process"
