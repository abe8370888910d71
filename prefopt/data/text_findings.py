"""What is wrong with a text by itself: damaged characters, markup that does not belong there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prefopt.data.template import HALF_A_CHARACTER, spellings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# all but tab and line breaks; C1 controls are what cp1252 quotation marks become in Latin-1
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# A UTF-8 lead byte as cp1252 shows it, and what may follow it.
_FOLLOWING = "[\x80-\xbf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152"
_FOLLOWING += "\u017d\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153"
_FOLLOWING += "\u017e\u0178]"
# One letter may be a capital before a closing quotation mark, so most scripts need two in a row.
_MOJIBAKE = re.compile(
    f"(?<![A-Z\xc0-\xde])[\xc2\xc3]{_FOLLOWING}|(?:[\xc4-\xdf]{_FOLLOWING}){{2}}"
    f"|[\xe0-\xef]{_FOLLOWING}{{2}}"
)
_MOJIBAKE_LEADS = re.compile("[\xc2-\xef]")
# Markup of the common chat templates; "<s>" is left to tokenizers, since HTML has it too.
_TEMPLATE_MARKUP = re.compile(
    r"<\|(?:im_start|im_end|im_sep|eot_id|end_of_text|begin_of_text|start_header_id|end_header_id"
    r"|endoftext|end_of_turn|system|user|assistant|end)\|>"
    r"|<(?:start_of_turn|end_of_turn|bos|eos)>|\[/?INST\]|<</?SYS>>|</s>\s*\Z"
)
# A list of messages that was written into one cell, as JSON or as Python shows it.
_MESSAGES = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content|from|value)\1\s*:")
_ROLES = "Human|Assistant|User|Bot|### (?:Human|Assistant|Instruction|Response)"
_PREFIX = re.compile(rf"(?:\A\s*|\n\n)({_ROLES}):(?=\s)")
REPEATED = 20  # characters that a prompt must have before its repetition counts


class TextChecks:
    """Looks at texts; knows the special tokens of a tokenizer, if it is given one.

    Args:
        tokenizer: The policy's, or None where it could not be loaded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        own = [] if tokenizer is None else spellings(tokenizer)
        self._own = re.compile("|".join(map(re.escape, own))) if own else None

    def problems(self, text: str) -> Iterator[tuple[str, str]]:
        """Yields (kind, what was found) for each kind of damage in a text."""
        garbled = False
        if not text.isascii():
            if half := HALF_A_CHARACTER.search(text):
                yield "half a character", f"{half[0]!a} in {_around(text, half.start())}"
            if "\ufffd" in text:
                yield "replacement character", f"U+FFFD in {_around(text, text.index(chr(65533)))}"
            if _MOJIBAKE_LEADS.search(text) and (place := _mojibake(text)) is not None:
                garbled = True  # of which C1 controls are a part
                yield "mojibake", _around(text, place)
        if (control := _CONTROL.search(text)) and not (garbled and control[0] > "\x7f"):
            yield "control character", f"{control[0]!a} in {_around(text, control.start())}"
        if _MESSAGES.match(text):
            yield "messages in a string", _around(text, 0)
        marked = (self._own and self._own.search(text)) or _TEMPLATE_MARKUP.search(text)
        if marked:
            spelled = marked[0].strip()
            yield "special token in text", f"{spelled!r} in {_around(text, marked.start())}"


def role_prefix(text: str) -> str | None:
    """The prefix of a turn that stands in a text which is one turn, such as "Human:"."""
    if ":" not in text:
        return None
    found = _PREFIX.search(text)
    return found[1] + ":" if found else None


def repeats(prompt: str, answer: str) -> bool:
    """Whether an answer begins with the whole of a prompt that is not quite short."""
    prompt = prompt.strip()
    return len(prompt) >= REPEATED and answer.lstrip().startswith(prompt)


def _mojibake(text: str) -> int | None:
    """Where UTF-8 that was read as cp1252 or Latin-1 begins: what decodes when that is undone."""
    for found in _MOJIBAKE.finditer(text):
        raw = b"".join(c.encode("cp1252" if ord(c) > 0xFF else "latin-1") for c in found[0])
        try:
            raw.decode()
        except UnicodeDecodeError:
            continue
        return found.start()
    return None


def _around(text: str, place: int) -> str:
    return repr(text[max(0, place - 20) : place + 20])
