"""Pairs, demonstrations and prompts as token ids, with what does not fit left out and counted.

The ids of a whole data set lie in a few flat arrays: 700,000 pairs of 1,000 tokens take 2.8 GB,
and worker processes forked from this one share them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from prefopt.data.rows import Completion, Demonstration, PreferencePair, Prompt, PromptRow
from prefopt.data.template import check_one_bos, encode, find_stop, render, stop_token_ids
from prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000  # prompts in one call of the tokenizer
T = TypeVar("T")


class Ragged:
    """Rows of token ids of different lengths, one after another in one array.

    >>> rows = Ragged([[5, 6], [7]])
    >>> rows.append([8, 9, 10])
    >>> len(rows), rows[2], rows.lengths.tolist()
    (3, [8, 9, 10], [2, 1, 3])
    """

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])
        for row in rows:
            self.append(row)

    def append(self, row: Sequence[int]) -> None:
        """Adds one row."""
        self._ids.extend(row)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[int]:
        index = range(len(self))[index]
        return self._ids[self._ends[index] : self._ends[index + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[index] for index in range(len(self)))

    def to_arrow(self) -> pa.ListArray:
        """The rows as an Arrow array of lists that shares the ids."""
        offsets = pa.array(np.asarray(self._ends), type=pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(np.asarray(self._ids)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of ids in each row, shape [rows]."""
        return np.diff(np.asarray(self._ends))


@dataclass
class DropCounts:
    """What tokenising left out, each item under the first reason that applies.

    Attributes:
        prompt_too_long: Prompts with more than ``max_prompt_length`` tokens.
        answer_too_long: Prompts that with an answer have more than ``max_length`` tokens.
        stop_token_inside: Answers whose text holds a stop token, such as "<|im_end|>".
        identical: Pairs whose two answers are the same tokens.
        duplicate: Prompts that occurred before, where each is wanted once.
    """

    prompt_too_long: int = 0
    answer_too_long: int = 0
    stop_token_inside: int = 0
    identical: int = 0
    duplicate: int = 0

    @property
    def total(self) -> int:
        """Items left out."""
        return sum(vars(self).values())


@dataclass
class LeftOut:
    """What was left out, item by item.

    Attributes:
        where: Places of the rows.
        reason: Which of `DropCounts` it is.
        prompt: Tokens of the prompt.
        whole: Tokens of the prompt with its longest answer.
    """

    where: list[str] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)
    prompt: array[int] = field(default_factory=lambda: array("q"))
    whole: array[int] = field(default_factory=lambda: array("q"))


@dataclass
class Tokenized:
    """Columns of equal length; item i is a dict of them, as a trainer reads it.

    Attributes:
        prompt_ids: Prompts, with the assistant header of a conversation.
        where: Places of the rows.
        dropped: How many were left out.
        left_out: Which were left out.
    """

    prompt_ids: Ragged = field(default_factory=Ragged)
    where: list[str] = field(default_factory=list)
    dropped: DropCounts = field(default_factory=DropCounts)
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def leave_out(self, reason: str, where: str, prompt: int, whole: int) -> None:
        """Counts what is left out, and keeps its place and its lengths (see `LeftOut`)."""
        setattr(self.dropped, reason, getattr(self.dropped, reason) + 1)
        self.left_out.where.append(where)
        self.left_out.reason.append(reason)
        self.left_out.prompt.append(prompt)
        self.left_out.whole.append(whole)

    def __getitem__(self, index: int) -> dict[str, Any]:
        columns = vars(self).items()
        return {name: c[index] for name, c in columns if isinstance(c, Ragged | array | list)}

    @property
    def fingerprint(self) -> str:
        """A 128-bit hash over all columns of all items, in order."""
        digest = xxhash.xxh3_128()
        for index in range(len(self)):
            digest.update(repr(self[index]).encode())
        return digest.hexdigest()


@dataclass
class TokenizedPairs(Tokenized):
    """Preference pairs as token ids.

    Attributes:
        chosen_ids: Better answers, with the token that ends them.
        rejected_ids: Other answers, likewise.
        p_chosen: Soft labels.
        margin: Margins.
    """

    chosen_ids: Ragged = field(default_factory=Ragged)
    rejected_ids: Ragged = field(default_factory=Ragged)
    p_chosen: array[float] = field(default_factory=lambda: array("d"))
    margin: array[float] = field(default_factory=lambda: array("d"))


@dataclass
class TokenizedDemonstrations(Tokenized):
    """Demonstrations as token ids: answers with the token that ends them."""

    completion_ids: Ragged = field(default_factory=Ragged)


@dataclass
class TokenizedPrompts(Tokenized):
    """Prompts as token ids, with the text that a judge reads."""

    prompt: list[Prompt] = field(default_factory=list)


@dataclass
class PromptedPairs(TokenizedPairs, TokenizedPrompts):
    """Preference pairs whose prompts are answered anew, too."""


@dataclass
class PromptedAnswers(TokenizedDemonstrations, TokenizedPrompts):
    """Offline answers to prompts that are answered anew, too."""


def occurrences(prompt_ids: Iterable[Sequence[int]]) -> list[int]:
    """For each row, how many rows before it have the same ids.

    Samples are a function of the prompt and of their number, so this tells equal prompts apart.

    >>> occurrences(Ragged([[5, 6], [7], [5, 6], [5, 6]]))
    [0, 0, 1, 2]
    """
    seen: Counter[bytes] = Counter()
    counts = []
    for ids in prompt_ids:
        key = xxhash.xxh3_128_digest(array("i", ids).tobytes())
        counts.append(seen[key])
        seen[key] += 1
    return counts


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
    keep_prompts: bool = False,
) -> TokenizedPairs:
    """Tokenises preference pairs; what is too long is left out whole, never cut.

    Args:
        pairs: The pairs.
        tokenizer: A tokenizer that `prefopt.data.template.check_tokenizer` accepts.
        max_prompt_length: The most tokens a prompt may have; None is no limit.
        max_length: The most tokens a prompt and either of its answers may have together; None is
            no limit.
        keep_prompts: Whether to return `PromptedPairs`, with the prompts' text for a judge.

    Raises:
        PrefoptError: If nothing is left, or the chat template cannot encode a pair.
    """
    kept = PromptedPairs() if keep_prompts else TokenizedPairs()
    limits = _Limits(tokenizer, max_prompt_length, max_length, kept)
    items = ((pair, pair.where, pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs)
    for pair, prompt_ids, (chosen_ids, rejected_ids) in _encode(items, tokenizer):
        if not limits.accept(pair.where, prompt_ids, [chosen_ids, rejected_ids]):
            continue
        if chosen_ids == rejected_ids:
            limits.leave_out("identical", pair.where, prompt_ids, [chosen_ids])
            continue
        kept.prompt_ids.append(prompt_ids)
        kept.chosen_ids.append(chosen_ids)
        kept.rejected_ids.append(rejected_ids)
        kept.p_chosen.append(pair.p_chosen)
        kept.margin.append(pair.margin)
        kept.where.append(pair.where)
        if isinstance(kept, PromptedPairs):
            kept.prompt.append(pair.prompt)
    limits.check_some_left(len(kept))
    return kept


def tokenize_demonstrations(
    demonstrations: Iterable[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    max_length: int | None,
    keep_prompts: bool = False,
) -> TokenizedDemonstrations:
    """Tokenises demonstrations, with the limits and errors of `tokenize_pairs`.

    With ``keep_prompts`` they are `PromptedAnswers`.
    """
    kept = PromptedAnswers() if keep_prompts else TokenizedDemonstrations()
    limits = _Limits(tokenizer, max_prompt_length, max_length, kept)
    items = ((item, item.where, item.prompt, (item.completion,)) for item in demonstrations)
    for demonstration, prompt_ids, (completion_ids,) in _encode(items, tokenizer):
        if limits.accept(demonstration.where, prompt_ids, [completion_ids]):
            kept.prompt_ids.append(prompt_ids)
            kept.completion_ids.append(completion_ids)
            kept.where.append(demonstration.where)
            if isinstance(kept, PromptedAnswers):
                kept.prompt.append(demonstration.prompt)
    limits.check_some_left(len(kept))
    return kept


def tokenize_prompts(
    prompts: Iterable[Prompt | PromptRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int | None,
    distinct: bool = False,
) -> TokenizedPrompts:
    """Tokenises prompts to be answered, with the limit and errors of `tokenize_pairs`.

    With ``distinct``, a prompt whose tokens occurred before is left out: samples of equal prompts
    would be equal.
    """
    kept = TokenizedPrompts()
    seen: set[tuple[int, ...]] = set()
    limits = _Limits(tokenizer, max_prompt_length, None, kept)
    rows = (
        row if isinstance(row, PromptRow) else PromptRow(row, f"prompt {number}")
        for number, row in enumerate(prompts, start=1)
    )
    items = ((row, row.where, row.prompt, ()) for row in rows)
    for row, prompt_ids, _ in _encode(items, tokenizer):
        if not limits.accept(row.where, prompt_ids, []):
            continue
        if distinct and tuple(prompt_ids) in seen:
            limits.leave_out("duplicate", row.where, prompt_ids, [])
            continue
        seen.add(tuple(prompt_ids))
        kept.prompt_ids.append(prompt_ids)
        kept.prompt.append(row.prompt)
        kept.where.append(row.where)
    limits.check_some_left(len(kept))
    return kept


def _encode(
    items: Iterable[tuple[T, str, Prompt, Sequence[Completion]]],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[tuple[T, list[int], list[list[int]]]]:
    """Yields each item with the ids of its prompt and answers; errors name the item's place."""
    items = iter(items)
    while batch := list(islice(items, _BATCH)):
        rendered = []
        for _, where, prompt, completions in batch:
            try:
                rendered.append(render(tokenizer, prompt, completions))
            except PrefoptError as error:
                raise PrefoptError(f"{where}: {error}", where=where) from error
        encoded = encode(tokenizer, rendered)
        for (item, where, _, _), (prompt_ids, completions_ids) in zip(batch, encoded, strict=True):
            try:
                check_one_bos(tokenizer, prompt_ids)
            except PrefoptError as error:
                raise PrefoptError(f"{where}: {error}", where=where) from error
            yield item, prompt_ids, completions_ids


class _Limits:
    """Sorts out what does not fit, counts it, and remembers the shortest for the error message."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_length: int | None,
        max_length: int | None,
        kept: Tokenized,
    ) -> None:
        self.max_prompt_length = max_prompt_length
        self.max_length = max_length
        self.kept, self.dropped = kept, kept.dropped
        self.stop_ids = frozenset(stop_token_ids(tokenizer))
        self.shortest_prompt: int | None = None
        self.shortest_whole: int | None = None

    def accept(self, where: str, prompt_ids: list[int], completions: list[list[int]]) -> bool:
        """Whether a prompt with its answers fits; counts it if not."""
        prompt = len(prompt_ids)
        whole = prompt + max(map(len, completions), default=0)
        self.shortest_prompt = min(prompt, self.shortest_prompt or prompt)
        self.shortest_whole = min(whole, self.shortest_whole or whole)
        if self.max_prompt_length is not None and prompt > self.max_prompt_length:
            reason = "prompt_too_long"
        elif self.max_length is not None and whole > self.max_length:
            reason = "answer_too_long"
        elif any(find_stop(ids, self.stop_ids) is not None for ids in completions):
            reason = "stop_token_inside"
        else:
            return True
        self.leave_out(reason, where, prompt_ids, completions)
        return False

    def leave_out(
        self, reason: str, where: str, prompt_ids: list[int], completions: list[list[int]]
    ) -> None:
        """Counts a row that is left out."""
        prompt = len(prompt_ids)
        self.kept.leave_out(reason, where, prompt, prompt + max(map(len, completions), default=0))

    def check_some_left(self, kept: int) -> None:
        """Raises PrefoptError if nothing was kept."""
        if kept:
            return
        if self.shortest_prompt is None:
            raise PrefoptError("nothing to tokenise: found no rows, expected at least one")
        if self.dropped.prompt_too_long == self.dropped.total:
            raise PrefoptError(
                "prompt longer than the limit everywhere: the shortest has "
                f"{self.shortest_prompt:,} tokens, max_prompt_length is "
                f"{self.max_prompt_length:,}; raise it"
            )
        raise PrefoptError(
            f"nothing is left after tokenising: {self.dropped.prompt_too_long:,} prompts exceed "
            f"max_prompt_length={self.max_prompt_length}, {self.dropped.answer_too_long:,} exceed "
            f"max_length={self.max_length} with their answers, "
            f"{self.dropped.stop_token_inside:,} answers hold a stop token, "
            f"{self.dropped.identical:,} pairs have identical answers; the shortest prompt has "
            f"{self.shortest_prompt:,} tokens, {self.shortest_whole:,} with its answer: raise the "
            "limits or mend the rows"
        )
