"""What a fuzz target is, and the property all of them share: no error but our own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

from hypothesis import strategies as st

from prefopt.errors import PrefoptError

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """A parser or a builder under test.

    Attributes:
        inputs: Draws inputs.
        check: Raises if one of them breaks what must hold.
        found: Inputs that once did, by what was wrong; they are tried first.
        raw: Whether inputs are bytes that a coverage-guided fuzzer may make as it likes.
    """

    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], None]
    found: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False


def attempt(call: Callable[..., T], *args: Any, **options: Any) -> T | PrefoptError:
    """What a call returns, or the error of ours that it raises, which must be one line."""
    try:
        return call(*args, **options)
    except PrefoptError as error:
        refused = error
    lines = str(refused).splitlines()
    assert len(lines) == 1, f"the message has {len(lines)} lines: {refused}"
    return refused


@cache
def scratch() -> Path:
    """A folder of this process that goes when it ends."""
    memory = Path("/dev/shm")  # where it exists, flushing a file costs nothing
    parent = memory if memory.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="prefopt-fuzz-", dir=parent))
    # unlike atexit's, also called where a process of a pool ends
    Finalize(None, rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)
    return folder


def file_of(name: str, content: bytes) -> Path:
    """A file with this content; the one before it of the same name is gone."""
    path = scratch() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# --- inputs that several targets share -----------------------------------------------------------

# half a character, line ends of several kinds, a byte order mark, letters of two code points
ODD_TEXTS = [
    "",
    " ",
    "\n",
    "\r\n",
    "\x00",
    "\x85",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\udc80",
    "é",
    "🤝🏽",
]
texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(ODD_TEXTS)
HUGE = [10**400, -(10**400), 2**63, 2**64, 1e308, -1e308, 5e-324, float("nan"), float("inf")]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(HUGE)
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)

_Edit = tuple[float, int, bytes]


def edited(contents: st.SearchStrategy[bytes], pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    """Contents with a few bytes taken out, others put in, or the end cut off."""
    piece = st.sampled_from(pieces) | st.binary(max_size=6)
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), piece), max_size=3)
    return st.builds(_edit, contents, edits, st.just(1.0) | st.floats(0, 1))


def _edit(content: bytes, edits: list[_Edit], kept: float) -> bytes:
    for place, removed, added in edits:
        start = int(place * len(content))
        content = content[:start] + added + content[start + removed :]
    return content[: round(kept * len(content))]


DEEP = b"[" * 100_000
JSON_PIECES = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\r", b"\\", b"\\ud800", b"\xff"),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"\xef\xbb\xbf", b"\x00", b"\xe2\x80\xa8"),
    *(b"9" * 400, b"9" * 5000, DEEP, b'{"a":' * 3000, b'{"prompt": "x"}\n'),
]


def json_lines(rows: list[Any]) -> bytes:
    """Rows as JSON lines; half characters stay escaped."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
