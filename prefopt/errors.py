"""Errors that a user can cause and mend; the command prints them as one line and exits with 2."""

from __future__ import annotations


class PrefoptError(Exception):
    """Something the user can put right: the message says what, where and how, on one line.

    Names and values from files may hold line breaks or a terminal's control codes: whatever is not
    printable is written as its escape.

    Args:
        message: The line.
        where: The place of the row that it is about, as ``file:row``, where it is about one.
    """

    def __init__(self, message: str = "", *, where: str = "") -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
        self.where = where


class DataError(PrefoptError):
    """A bad row, file or field.

    Args:
        where: The place, as ``file:row`` (rows count from 1).
        field: The column that is wrong.
        problem: What was found, what was expected and what to do.
    """

    def __init__(self, where: str, field: str, problem: str) -> None:
        super().__init__(f"{where}: field {field!r}: {problem}", where=where)
        self.field, self.problem = field, problem
