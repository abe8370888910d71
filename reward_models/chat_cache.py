"""What a chat API has answered, on disk: one line an answer, written as soon as it arrives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import filelock

from prefopt.errors import DataError, PrefoptError

_BEGINNING = b'{"key": "'  # of every line: a file that is no cache is never cut


class ChatCache:
    """An append-only JSONL file of responses, each under the key of its request.

    Attributes:
        path: The file; beside it stands a lock file, ``.lock``.
        responses: Key -> the server's JSON, as of the last time the file was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.responses: dict[str, dict[str, Any]] = {}
        self._file: FileIO | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the file for this process, with all that it has read.

        Raises:
            PrefoptError: Another process holds it, or the file is not a cache of answers.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(f"{self.path}.lock", blocking=False):
                self._read()
                with open(self.path, "ab", buffering=0) as self._file:
                    yield
        except filelock.Timeout:
            raise PrefoptError(
                f"{self.path}: found another process or thread that asks through this cache; wait "
                "until it has ended, or give this one a cache of its own"
            ) from None

    def add(self, key: str, response: dict[str, Any]) -> None:
        """Puts a response on the disk; it is there when this returns.

        Raises:
            PrefoptError: The disk is full or gone; no part of the line is left.
        """
        assert self._file is not None, "the cache is opened first"
        rest = f"{json.dumps({'key': key, 'response': response})}\n".encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while rest:  # a disk that is almost full takes a part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            os.truncate(self._file.fileno(), end)
            raise PrefoptError(
                f"{self.path}: an answer cannot be written: {error.strerror}; when that is mended "
                "the same command goes on from the answers that are there"
            ) from error
        self.responses[key] = response

    def _read(self) -> None:
        """Reads the file; the half of a line that a killed process left is cut off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        *lines, rest = content.split(b"\n")
        self.responses = dict(self._parse(line, n) for n, line in enumerate(lines, start=1))
        if rest:
            if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
                raise self._bad(len(lines) + 1)
            os.truncate(self.path, len(content) - len(rest))

    def _parse(self, line: bytes, number: int) -> tuple[str, dict[str, Any]]:
        try:
            row = json.loads(line)
            key, response = row["key"], row["response"]
        except (ValueError, TypeError, KeyError):
            raise self._bad(number) from None
        if not isinstance(key, str) or not isinstance(response, dict):
            raise self._bad(number)
        return key, response

    def _bad(self, number: int) -> DataError:
        return DataError(
            f"{self.path}:{number}",
            "response",
            "found no answer of a chat API; expected a cache that prefopt has written: name "
            "another file, or remove this line",
        )
