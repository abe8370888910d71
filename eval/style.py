"""Length and markdown of answers, and what two answers differ in, for style control."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# a word, a mark of punctuation, or one character of Chinese or Japanese
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+|[^\w\s]"
)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADER = re.compile(r" {0,3}#{1,6}\s+\S", re.MULTILINE)
_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,9}[.)])[ \t]+\S")
_CODE = re.compile(r"`[^`\n]+`")
# at most 500 characters long: without a bound the time grows with the square of a line of "**a **a"
_BOLD = re.compile(
    r"\*\*(?=[^\s*])[^\n]{1,500}?(?<=[^\s*])\*\*"
    r"|(?<!\w)__(?=[^\s_])[^\n]{1,500}?(?<=[^\s_])__(?!\w)"
)

FEATURES = ("length", "headers", "lists", "bold")


@dataclass(frozen=True)
class Style:
    """What is counted in an answer.

    Attributes:
        tokens: Words and marks of punctuation; each Chinese or Japanese character is one.
        headers: Markdown headers.
        lists: Items of markdown lists, numbered or not.
        bold: Stretches of bold text, of at most 500 characters each.
    """

    tokens: int
    headers: int
    lists: int
    bold: int


def style_of(text: str) -> Style:
    """Counts; markdown inside fenced code does not count, its words do.

    >>> style_of("# Fish\\n- **cod**\\n- eel")
    Style(tokens=10, headers=1, lists=2, bold=1)
    """
    lines = _prose(text)
    return Style(
        tokens=len(_TOKEN.findall(text)),
        headers=sum(bool(_HEADER.match(line)) for line in lines),
        lists=sum(bool(_ITEM.match(line)) for line in lines),
        bold=sum(len(_BOLD.findall(_CODE.sub("", line))) for line in lines),
    )


def _prose(text: str) -> list[str]:
    """The lines outside fenced code; a fence that is never closed lasts to the end."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines():
        found = _FENCE.match(line)
        if fence:
            closes = found and found[1].startswith(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
        elif found:
            fence = found[1]
        else:
            lines.append(line)
    return lines


def style_differences(model: Sequence[Style], baseline: Sequence[Style]) -> npt.NDArray[np.float64]:
    """What style control regresses on, shape [answers, 4], in the order of `FEATURES`.

    Length is (m - b) / (m + b) in tokens. Of headers, list items and bold text the densities
    d = count / (tokens + 1) are compared, (d_m - d_b) / (d_m + d_b + 1), as in Arena-Hard 2
    (https://github.com/lmarena/arena-hard-auto). All are 0 for equal answers and change their sign
    when the two are exchanged.
    """
    m, b = (_counts(part) for part in (model, baseline))
    length = (m[:, :1] - b[:, :1]) / np.maximum(m[:, :1] + b[:, :1], 1)
    dm, db = (part[:, 1:] / (part[:, :1] + 1) for part in (m, b))
    return np.concatenate([length, (dm - db) / (dm + db + 1)], axis=1)


def _counts(styles: Sequence[Style]) -> npt.NDArray[np.float64]:
    rows = [(style.tokens, style.headers, style.lists, style.bold) for style in styles]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)
