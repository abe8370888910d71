"""Prompt trees: one prompt with its K completions, encoded once and packed into one batch.

A row holds ``[prompt | completion 1 | completion 2 | ...]`` and possibly further trees. Each
completion's positions go on from its prompt, and it attends to its prompt and itself only, so the
numbers are those of K separate rows at the price of one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.errors import PrefoptError

Layout = Literal["tree", "separate"]


@dataclass(frozen=True, slots=True)
class PromptTree:
    """A prompt and its completions as token ids; all of them hold at least one token."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        if not len(self.prompt) or not self.completions or not all(map(len, self.completions)):
            sizes = [len(c) for c in self.completions]
            raise PrefoptError(
                f"a prompt tree needs a prompt and completions of at least one token; found a "
                f"prompt of {len(self.prompt)} and completions of {sizes} tokens"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens the tree takes up in a row."""
        return len(self.prompt) + sum(map(len, self.completions))


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of queries and the prefix it may see besides itself, as flat positions."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int


@dataclass(frozen=True)
class TreeBatch:
    """Packed token ids and the index arrays that say which token belongs to which completion.

    "Flat" positions count through ``input_ids`` row by row. Completions are numbered tree by tree.

    Attributes:
        input_ids: Token ids, shape [rows, width].
        position_ids: Positions within prompt + completion, shape [rows, width].
        attention_mask: For the separate layout, 1 on real tokens, [rows, width]; otherwise None.
        predict_from: Flat position whose hidden state predicts each completion token, [tokens].
        targets: The completion tokens, [tokens].
        owner: The completion each token belongs to, [tokens].
        last: Flat position of each completion's last token, [completions].
        lengths: Tokens in each completion, [completions].
        tree_of: The tree each completion belongs to, [completions].
        num_trees: How many trees there are.
        segments: What attends to what, in the order of ``start``; empty for the separate layout.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    predict_from: Tensor
    targets: Tensor
    owner: Tensor
    last: Tensor
    lengths: Tensor
    tree_of: Tensor
    num_trees: int
    segments: tuple[Segment, ...]

    @property
    def num_completions(self) -> int:
        """Number of completions."""
        return len(self.lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TreeBatch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def sum_per_completion(self, token_values: Tensor) -> Tensor:
        """Adds up a value per completion token, [tokens], to one per completion, [completions]."""
        sums = token_values.new_zeros(self.num_completions)
        return sums.index_add(0, self.owner, token_values)


def collate_trees(
    trees: Sequence[PromptTree],
    *,
    layout: Layout = "tree",
    max_row_tokens: int | None = None,
    padding_side: Literal["right", "left"] = "right",
    pad_to_multiple_of: int = 1,
) -> TreeBatch:
    """Packs trees into a batch.

    Args:
        trees: The trees, in the order their completions are numbered.
        layout: ``tree`` shares the prompt; ``separate`` gives each completion a row of its own
            with its own copy of the prompt, right-padded, for models that cannot attend in trees.
        max_row_tokens: Begin a new row before a row would exceed this; None puts all in one row.
        padding_side: The side on which rows are filled up to the width of the longest; always the
            right for separate rows, whose positions the model counts from the row's beginning.
        pad_to_multiple_of: Makes the width a multiple of this.

    Returns:
        The batch, on the CPU.

    Examples:
        >>> batch = collate_trees([PromptTree([5, 6], [[7, 8], [9]])])
        >>> batch.input_ids.tolist(), batch.position_ids.tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
        >>> batch.predict_from.tolist(), batch.targets.tolist(), batch.owner.tolist()
        ([1, 2, 1], [7, 8, 9], [0, 0, 1])
    """
    if layout == "separate":
        rows = [[PromptTree(t.prompt, [c])] for t in trees for c in t.completions]
    else:
        rows = _fill_rows(trees, max_row_tokens)
    used = [sum(t.num_tokens for t in row) for row in rows]
    width = -(-max(used) // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    placed = _Placement()
    for r, row in enumerate(rows):
        offset = width - used[r] if padding_side == "left" and layout == "tree" else 0
        ids = [token for t in row for part in (t.prompt, *t.completions) for token in part]
        input_ids[r, offset : offset + used[r]] = torch.tensor(ids)
        mask[r, offset : offset + used[r]] = 1
        cursor = r * width + offset
        for tree in row:
            cursor = placed.add(tree, cursor, position_ids.view(-1))
    tree_of = [i for i, tree in enumerate(trees) for _ in tree.completions]
    return TreeBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask if layout == "separate" else None,
        predict_from=torch.cat(placed.predict_from),
        targets=torch.tensor([x for t in trees for c in t.completions for x in c]),
        owner=torch.repeat_interleave(torch.tensor(placed.lengths)),
        last=torch.tensor(placed.last),
        lengths=torch.tensor(placed.lengths),
        tree_of=torch.tensor(tree_of),
        num_trees=len(trees),
        segments=tuple(placed.segments) if layout == "tree" else (),
    )


def _fill_rows(trees: Sequence[PromptTree], max_row_tokens: int | None) -> list[list[PromptTree]]:
    """Splits the trees, in order, into rows of ``max_row_tokens`` at most, or of one tree."""
    rows: list[list[PromptTree]] = [[]]
    used = 0
    for tree in trees:
        if rows[-1] and max_row_tokens is not None and used + tree.num_tokens > max_row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(tree)
        used += tree.num_tokens
    return rows


class _Placement:
    """Collects where the parts of each tree come to lie."""

    def __init__(self) -> None:
        self.predict_from: list[Tensor] = []
        self.last: list[int] = []
        self.lengths: list[int] = []
        self.segments: list[Segment] = []

    def add(self, tree: PromptTree, start: int, flat_positions: Tensor) -> int:
        """Places a tree at the flat position ``start``; returns the flat position after it."""
        size = len(tree.prompt)
        flat_positions[start : start + size] = torch.arange(size)
        self.segments.append(Segment(start, size, start, 0))
        cursor = start + size
        for completion in tree.completions:
            length = len(completion)
            flat_positions[cursor : cursor + length] = torch.arange(size, size + length)
            sources = torch.arange(cursor - 1, cursor + length - 1)
            sources[0] = start + size - 1  # the first token is predicted by the prompt's last
            self.predict_from.append(sources)
            self.segments.append(Segment(cursor, length, start, size))
            self.lengths.append(length)
            cursor += length
            self.last.append(cursor - 1)
        return cursor
