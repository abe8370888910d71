"""Rows of a data set to preference pairs, demonstrations and prompts; bad rows are named.

Two kinds of text are kept apart. A conversation is a list of messages and goes through the chat
template; a plain string is continued as it is and never templated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prefopt.data.sources import LocatedRow, Row
from prefopt.errors import DataError, PrefoptError

Message = dict[str, str]
Prompt = str | list[Message]
Completion = str | list[Message]
T = TypeVar("T")
_Here = tuple[str, str]  # the row's place and the column, for error messages

# What may come after a message; a conversation begins with a system or a user message.
_FOLLOWERS = {
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
# Parts of a message that a template would render, so dropping them would change the text.
_UNSUPPORTED = ("tool_calls", "reasoning_content", "thinking")
_TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")


def group_by_prompt(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The positions of equal prompts, in order of their first appearance.

    >>> group_by_prompt(["moo", "woof", "moo"])
    [[0, 2], [1]]
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(json.dumps(prompt, sort_keys=True), []).append(i)
    return [*groups.values()]


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text to read: a single message as it is, a conversation with its roles.

    >>> prompt_text([{"role": "user", "content": "moo"}])
    'moo'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt.

    Attributes:
        prompt: A string, or messages that end with a user or tool message.
        chosen: The better answer: a string, or one assistant message, as the prompt is.
        rejected: The other answer.
        p_chosen: The probability that ``chosen`` is the better one, in [0, 1]. Below 0.5 the label
            says that ``rejected`` is; the two are not exchanged.
        margin: By how much ``chosen`` is better, on the annotator's scale.
        where: The place of the row, ``file:row``.
    """

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    p_chosen: float = 1.0
    margin: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """An offline answer: a string after a string, or one assistant message after messages."""

    prompt: Prompt
    completion: Completion
    where: str = ""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to answer, and the place of its row, ``file:row``."""

    prompt: Prompt
    where: str


def parse_pair(row: Row, where: str) -> PreferencePair:
    """Reads a preference pair.

    Four layouts are accepted; ``p_chosen`` and ``margin`` may stand beside any of them:

    - ``prompt`` as messages, ``chosen`` and ``rejected`` as one assistant message or its text;
    - ``prompt``, ``chosen`` and ``rejected`` as plain strings;
    - ``prompt`` as a string, ``chosen`` and ``rejected`` as whole conversations that contain it,
      or as the assistant message alone;
    - no ``prompt``: ``chosen`` and ``rejected`` are whole conversations, as messages or as
      ``Human: ... Assistant: ...`` transcripts, that differ in the last message only.

    Args:
        row: The row's columns; others are ignored.
        where: The row's place, for error messages.

    Raises:
        DataError: If the row is not such a pair; the problem begins with its kind and a colon.

    >>> pair = parse_pair({"chosen": "\\n\\nHuman: 1+1?\\n\\nAssistant: 2",
    ...                    "rejected": "\\n\\nHuman: 1+1?\\n\\nAssistant: 3"}, "hh.jsonl:1")
    >>> pair.prompt, pair.chosen
    ([{'role': 'user', 'content': '1+1?'}], [{'role': 'assistant', 'content': '2'}])
    """
    prompt, chosen = _split(row, "chosen", where)
    other_prompt, rejected = _split(row, "rejected", where)
    here = (where, "rejected")
    if type(chosen) is not type(rejected):
        found = f"found {_name(row['rejected'])} beside {_name(row['chosen'])} in 'chosen'"
        raise _bad(here, "wrong type", f"{found}; expected both alike")
    if prompt != other_prompt:
        raise _bad(
            here,
            "different prompts",
            "this conversation and the one in 'chosen' differ before their last message, and a "
            "pair answers one prompt; cut both after the first assistant message that differs",
        )
    if chosen == rejected:
        raise _bad(here, "chosen equals rejected", "found the same text twice; remove the row")
    p_chosen = _number(row, "p_chosen", where, default=1.0)
    if not 0 <= p_chosen <= 1:
        expected = "expected the probability, from 0 to 1, that 'chosen' is better"
        raise _bad((where, "p_chosen"), "out of range", f"found {p_chosen}, {expected}")
    margin = _number(row, "margin", where, default=0.0)
    return PreferencePair(prompt, chosen, rejected, p_chosen, margin, where)


def parse_demonstrations(row: Row, where: str) -> list[Demonstration]:
    """Reads the answers to imitate from ``messages``, or from ``prompt`` and ``completion``.

    Each assistant message of ``messages`` is one demonstration whose prompt is what precedes it.
    ``prompt`` and ``completion`` may be messages or strings, in the layouts of `parse_pair`.

    Args:
        row: The row's columns; others are ignored.
        where: The row's place, for error messages.

    Raises:
        DataError: If the row holds no demonstration; the problem begins with its kind and a colon.

    >>> turns = [{"role": r, "content": c} for r, c in
    ...          [("user", "Hi"), ("assistant", "Hello!"), ("user", "1+1?"), ("assistant", "2")]]
    >>> [len(d.prompt) for d in parse_demonstrations({"messages": turns}, "chat.jsonl:1")]
    [1, 3]
    """
    if "completion" in row:
        return [Demonstration(*_split(row, "completion", where), where)]
    here = (where, "messages")
    turns = _conversation(row, here)
    _require_assistant(turns, here)
    demonstrations = []
    for index, message in enumerate(turns):
        if message["role"] == "assistant":
            prompt, completion = turns[:index], [message]
            _check_prompt(prompt, here)
            _check_completion(completion, here)
            demonstrations.append(Demonstration(prompt, completion, where))
    return demonstrations


def parse_answer(row: Row, where: str, column: str) -> Demonstration:
    """Reads the prompt and the one offline answer to it that a column holds.

    Beside ``prompt``, or with the prompt in it, the column may have every layout that `parse_pair`
    reads in ``chosen``. In ``messages``, a whole conversation, the answer is the last assistant
    message and the prompt is what precedes it; what follows is left out.

    Args:
        row: The row's columns; others than ``column`` and ``prompt`` are ignored.
        where: The row's place, for error messages.
        column: Such as "chosen", "completion", "reference" or "messages".

    Raises:
        DataError: If the column holds no such answer; the problem begins with its kind and a colon.

    >>> row = {"prompt": "POST: I lost my dog. TL;DR:", "summary": " Dog lost."}
    >>> parse_answer(row, "tldr.jsonl:1", "summary").completion
    ' Dog lost.'
    """
    here = (where, column)
    if column not in row:
        remedy = "name the column that holds them in trainer.reset_column"
        raise _missing(row, here, f"offline answers in {column!r}; {remedy}")
    if column != "messages":
        return Demonstration(*_split(row, column, where), where)
    turns = _conversation(row, here)
    _require_assistant(turns, here)
    while turns[-1]["role"] != "assistant":
        turns.pop()
    prompt, completion = _cut(turns, here)
    _check_prompt(prompt, here)
    _check_completion(completion, here)
    return Demonstration(prompt, completion, where)


def parse_prompt(row: Row, where: str) -> Prompt:
    """Reads the prompt to answer, whatever kind of row it stands in.

    It is ``prompt``; or ``messages``, ``chosen`` or ``completion`` without the last assistant
    message where they hold whole conversations.

    Args:
        row: The row's columns; others are ignored.
        where: The row's place, for error messages.

    Raises:
        DataError: If the row holds no prompt; the problem begins with its kind and a colon.

    >>> parse_prompt({"prompt": "Once upon a time"}, "prompts.jsonl:1")
    'Once upon a time'
    """
    for field in ("chosen", "completion"):
        if field in row and not isinstance(row.get("prompt"), list):
            return _split(row, field, where)[0]
    prompt: Prompt
    if "prompt" in row:
        here = (where, "prompt")
        prompt = row["prompt"] if isinstance(row["prompt"], str) else _messages(row["prompt"], here)
    else:
        here = (where, "messages")
        turns = _conversation(row, here)
        prompt = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    _check_prompt(prompt, here)
    return prompt


def parse_prompt_row(row: Row, where: str) -> PromptRow:
    """Reads the prompt to answer, as `parse_prompt` does, and keeps its place."""
    return PromptRow(parse_prompt(row, where), where)


def validate(
    rows: Iterable[LocatedRow],
    parse: Callable[[Row, str], T],
    *,
    invalid: Literal["error", "drop"] = "error",
) -> tuple[list[T], dict[str, int]]:
    """Parses every row before anything else is done with one.

    Args:
        rows: (where, row), as `prefopt.data.sources.read_rows` yields them.
        parse: `parse_pair`, `parse_demonstrations` or another function of a row and its place.
        invalid: What a bad row does: stop ("error") or be left out and counted ("drop").

    Returns:
        The parsed rows, and the number of rows left out for each kind of problem.

    Raises:
        DataError: For the first bad row, with the number of bad rows by kind, if bad rows are
            errors or none of the rows is good.

    >>> rows = [("a:1", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}), ("a:2", {})]
    >>> pairs, dropped = validate(rows, parse_pair, invalid="drop")
    >>> len(pairs), dropped
    (1, {'missing column': 1})
    """
    if invalid not in ("error", "drop"):
        raise PrefoptError(f"invalid rows: found {invalid!r}, expected 'error' or 'drop'")
    good: list[T] = []
    problems: Counter[str] = Counter()
    first: DataError | None = None
    for where, row in rows:
        try:
            good.append(parse(row, where))
        except DataError as error:
            first = first or error
            problems[error.problem.split(":")[0]] += 1
    if first and (invalid == "error" or not good):
        raise _with_counts(first, problems, len(good) + problems.total()) from first
    return good, dict(problems)


def _with_counts(first: DataError, problems: Counter[str], rows: int) -> DataError:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in problems.most_common())
    remedy = "nothing is left without them"
    if problems.total() < rows:
        remedy = "data.invalid_rows=drop leaves them out"
    return DataError(
        first.where,
        first.field,
        f"{first.problem} (bad rows: {problems.total():,} of {rows:,}: {kinds}; {remedy})",
    )


def _split(row: Row, field: str, where: str) -> tuple[Prompt, Completion]:
    """The prompt and the answer that one column of a row, with its ``prompt``, stands for."""
    here = prompt_here = (where, field)
    if field not in row:
        raise _missing(row, here)
    value, prompt = row[field], row.get("prompt")
    completion: Completion
    if "prompt" not in row:
        prompt, completion = _cut(_conversation(row, here), here)
    elif isinstance(prompt, str) and not isinstance(value, str):
        completion = turns = _messages(value, here)
        if len(turns) == 1:
            prompt_here = (where, "prompt")
            prompt = [{"role": "user", "content": prompt}]
        else:
            _check_contains(turns, prompt, here)
            prompt, completion = _cut(turns, here)
    else:
        prompt_here = (where, "prompt")
        completion = value
        if not isinstance(prompt, str):
            prompt = _messages(prompt, prompt_here)
            answer = [{"role": "assistant", "content": value}]
            completion = answer if isinstance(value, str) else _messages(value, here)
    _check_prompt(prompt, prompt_here)
    _check_completion(completion, here)
    return prompt, completion


def _conversation(row: Row, here: _Here) -> list[Message]:
    """A column that holds a whole conversation, as messages or as a transcript."""
    field = here[1]
    if field not in row:
        raise _missing(row, here)
    value = row[field]
    turns = _transcript(value, here) if isinstance(value, str) else _messages(value, here)
    _check_order(turns, here)
    return turns


def _transcript(text: str, here: _Here) -> list[Message]:
    """Turns of a dialogue written as in HH-RLHF (Bai et al. 2022, arXiv:2204.05862)."""
    before, *parts = _TRANSCRIPT.split(text)
    if before or not parts:
        raise _bad(
            here,
            "no prompt",
            "found a plain string and no 'prompt' column; expected that column, or a transcript "
            "'\\n\\nHuman: ...\\n\\nAssistant: ...', or a list of messages",
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _messages(value: Any, here: _Here) -> list[Message]:
    """Checks messages one by one, not their order, and keeps what a template renders."""
    if not isinstance(value, list):
        expected = 'a list of messages [{"role": ..., "content": ...}] or a string'
        raise _bad(here, "wrong type", f"found {_name(value)}, expected {expected}")
    if not value:
        kind = "empty prompt" if here[1] == "prompt" else "empty completion"
        raise _bad(here, kind, "found a list without messages, expected at least one")
    return [_message(item, number, here) for number, item in enumerate(value, start=1)]


def _message(item: Any, number: int, here: _Here) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        found = f"the keys {', '.join(map(str, item))}" if isinstance(item, dict) else _name(item)
        expected = "an object with role and content"
        if isinstance(item, dict) and {"from", "value"} <= item.keys():
            expected += (
                ": rename from to role and value to content, human to user, gpt to assistant"
            )
        raise _bad(here, "wrong type", f"message {number}: found {found}, expected {expected}")
    role, content = item["role"], item["content"]
    if role not in tuple(_FOLLOWERS):  # a tuple, because what stands there may not be hashable
        expected = ", ".join(_FOLLOWERS)
        raise _bad(here, "unknown role", f"message {number}: found {role!r}, expected {expected}")
    if not isinstance(content, str):
        found = f"message {number}: content is {_name(content)}"
        raise _bad(here, "wrong type", f"{found}, expected a string")
    lost = next((key for key in _UNSUPPORTED if item.get(key)), None)
    if lost:
        remedy = "write it into content, as the model is to produce it"
        raise _bad(here, "unsupported", f"message {number}: {lost!r} would be lost; {remedy}")
    return {"role": role, "content": content}


def _check_order(turns: list[Message], here: _Here) -> None:
    allowed: tuple[str, ...] = ("system", "user")
    before = "at the start"
    for number, message in enumerate(turns, start=1):
        role = message["role"]
        if role not in allowed:
            found = f"message {number} ({role}) {before}"
            raise _bad(
                here, "roles do not alternate", f"{found}, expected {' or '.join(allowed)} there"
            )
        allowed, before = _FOLLOWERS[role], f"comes after {role}"


def _require_assistant(turns: list[Message], here: _Here) -> None:
    if all(message["role"] != "assistant" for message in turns):
        raise _bad(here, "no assistant turn", "the conversation has no answer in it; add one")


def _cut(turns: list[Message], here: _Here) -> tuple[list[Message], list[Message]]:
    _require_assistant(turns, here)
    return turns[:-1], turns[-1:]


def _check_contains(turns: list[Message], prompt: str, here: _Here) -> None:
    questions = [message["content"].strip() for message in turns if message["role"] == "user"]
    if prompt.strip() not in questions:
        raise _bad(
            here,
            "different prompts",
            "no user message of this conversation is the text in 'prompt'; make them agree or "
            "leave 'prompt' out",
        )


def _check_prompt(prompt: Prompt, here: _Here) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _bad(here, "empty prompt", "found whitespace only, expected text")
        return
    for number, message in enumerate(prompt, start=1):
        if not message["content"].strip():
            found = f"message {number} ({message['role']}) is whitespace only"
            raise _bad(here, "empty prompt", f"{found}; write it or remove it")
    _check_order(prompt, here)
    last = prompt[-1]["role"] if prompt else "nothing"
    if last not in ("user", "tool"):
        expected = "a user or tool message to answer"
        raise _bad(here, "no question", f"the prompt ends with {last}, expected {expected}")


def _check_completion(completion: Completion, here: _Here) -> None:
    if not isinstance(completion, str):
        roles = [message["role"] for message in completion]
        if roles != ["assistant"]:
            found = f"the answer is {', '.join(roles)}"
            expected = "one assistant message, with all that precedes it in the prompt"
            raise _bad(here, "not an assistant message", f"{found}; expected {expected}")
        completion = completion[0]["content"]
    if not completion.strip():
        raise _bad(here, "empty completion", "found whitespace only, expected an answer")


def _number(row: Row, field: str, where: str, *, default: float) -> float:
    value = row.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        expected = f"expected a number; leave the column out to mean {default}"
        raise _bad((where, field), "wrong type", f"found {_name(value)}, {expected}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 308 digits
        number = math.inf
    if not math.isfinite(number):
        raise _bad((where, field), "not finite", f"found {value!r:.40}, expected a finite number")
    return number


def _missing(row: Row, here: _Here, expected: str = "") -> DataError:
    layouts = {
        "completion": "prompt and completion, or messages",
        "messages": "messages, or prompt (and completion, if it is to be imitated)",
    }
    pair = "chosen and rejected, and prompt unless they contain it"
    expected = expected or layouts.get(here[1], pair)
    columns = ", ".join(map(str, row)) or "none"
    return _bad(here, "missing column", f"found the columns {columns}; expected {expected}")


def _name(value: Any) -> str:
    names = {str: "a string", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), repr(value))


def _bad(here: _Here, kind: str, detail: str) -> DataError:
    """A problem whose text begins with its kind, which is what `validate` counts by."""
    return DataError(*here, f"{kind}: {detail}")
