"""Files that tell when they were damaged: beside each lies the sum of what was written.

The sum of ``NAME`` is in ``.NAME.xxh128``, as ``xxh128sum -c`` reads it. It is written first, so a
file that was ever complete has one. A file without a sum, as older versions wrote them, is
taken as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from prefopt.disk import check_space
from prefopt.errors import PrefoptError
from prefopt.rounds.storage import as_bytes, atomic_write

logger = logging.getLogger(__name__)

CHUNK = 2**22


class DamagedError(PrefoptError):
    """A file is not what was written.

    Args:
        damage: Which, what was found, and what was expected.
        otherwise: What to do about it.
    """

    def __init__(self, damage: str, otherwise: str) -> None:
        super().__init__(f"{damage}; {otherwise}")
        self.damage = damage


def sum_path(path: Path) -> Path:
    """Where the sum of a file is."""
    return path.with_name(f".{path.name}.xxh128")


def summed_files(folder: Path) -> list[Path]:
    """The files of a folder that have a sum, whether they are still there or not; in order."""
    sums = folder.glob(".*.xxh128")
    return sorted(path.with_name(path.name.removeprefix(".")).with_suffix("") for path in sums)


def write_summed(path: Path, content: str | bytes) -> None:
    """Writes a file as `atomic_write` does, and its sum before it.

    Where a file is replaced, its sum goes first and the new one comes last: whenever that is cut
    off, neither content is measured by the other's sum.

    Raises:
        PrefoptError: The disk has no room for it.
    """
    content = as_bytes(content)
    check_space(path, len(content), path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = xxhash.xxh3_128_hexdigest(content)
    if path.exists():
        sum_path(path).unlink(missing_ok=True)
        atomic_write(path, content)
        write_sum(path, found)
    else:
        write_sum(path, found)
        atomic_write(path, content)


def write_sum(path: Path, found: str) -> None:
    """Writes down what the sum of a file is to be, which is then written."""
    atomic_write(sum_path(path), f"{found}  {path.name}\n", sync_name=False)


def read_summed(path: Path, otherwise: str) -> bytes:
    """The content of a file.

    Args:
        path: The file.
        otherwise: What to do where it is damaged, for the error.

    Raises:
        DamagedError: It is not what was written.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    expected = expected_sum(path)
    found = xxhash.xxh3_128_hexdigest(content)
    if expected not in (None, found):
        raise DamagedError(_says(path, len(content), found, expected), otherwise)
    return content


def expected_sum(path: Path) -> str | None:
    """What the sum of a file is to be; None where nothing says so."""
    try:
        words = sum_path(path).read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        return None
    return words[0] if words else ""


def sum_of_file(path: Path) -> str:
    """XXH3 of 128 bits over a file, which may be larger than memory; in hexadecimal digits."""
    found = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def damage_of(path: Path) -> str | None:
    """What is wrong with a file that is there, in words; None where it is as it was written."""
    expected = expected_sum(path)
    if expected is None or (found := sum_of_file(path)) == expected:
        return None
    return _says(path, path.stat().st_size, found, expected)


def damaged(paths: Iterable[Path]) -> dict[Path, str]:
    """Those of some files that are there and damaged, and in words how."""
    found = ((path, damage_of(path)) for path in paths if path.exists())
    return {path: damage for path, damage in found if damage is not None}


def set_aside(damages: Mapping[Path, str]) -> None:
    """Takes damaged files out of the way, as ``NAME.corrupt``; one process calls this."""
    for path, damage in damages.items():
        kept = path.replace(path.with_name(f"{path.name}.corrupt"))
        logger.warning("%s; kept as %s, made again", damage, kept.name)


def _says(path: Path, size: int, found: str, expected: str | None) -> str:
    return (
        f"{path}: damaged: found {size} bytes with the XXH3 sum {found}, expected the sum "
        f"{expected or 'of which nothing is left'}"
    )
