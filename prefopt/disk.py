"""A disk that is full, or nearly so, said in one line that names what is safe and what to do."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefopt.errors import PrefoptError

RESERVE = 2**20  # bytes that are left free beside what is asked for and a tenth of it

# how libraries say it whose errors carry no number: safetensors, tokenizers, torch.save
_SAYINGS = (
    "No space left on device",
    "Disk quota exceeded",
    "inline_container.cc",
    "PytorchStreamWriter failed",
)
_GO_ON = (
    "all that was complete before is still there. Free space there and run the same command again: "
    "it goes on from what is complete"
)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    if isinstance(error, PrefoptError):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(saying in str(error) for saying in _SAYINGS)


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Has a full disk end the block with an error that the user can mend.

    Args:
        path: The file or folder that is written.
        what: What it is, in words.

    Raises:
        PrefoptError: The disk is full.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises no type of its own
        if not is_full(error):
            raise
        place = path
        if isinstance(error, OSError) and isinstance(error.filename, str):
            place = Path(error.filename)
        raise PrefoptError(
            f"{_folder(place)}: the disk is full ({_amount(free_space(place))} free) while {what} "
            f"was written; {_GO_ON}"
        ) from error


def check_space(path: Path, needed: int, what: str) -> None:
    """Refuses to begin writing what the disk has no room for.

    Args:
        path: The file or folder to write.
        needed: Bytes that it takes, estimated.
        what: What it is, in words.

    Raises:
        PrefoptError: Less is free than is needed, a tenth of it and ``RESERVE``.
    """
    free = free_space(path)
    if free < needed + needed // 10 + RESERVE:
        raise PrefoptError(
            f"{_folder(path)}: the disk is nearly full: {what} takes about {_amount(needed)} and "
            f"{_amount(free)} are free; nothing of it was written, and {_GO_ON}"
        )


def free_space(path: Path) -> int:
    """Bytes free for this user where a path lies or is to lie."""
    return shutil.disk_usage(_folder(path)).free


def _folder(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def _amount(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
