"""Numbers that a transformers model says after the last token of many token sequences.

Sequences that begin alike (the answers to one prompt, the comparisons of one context) share their
beginning on a tree. What is shared is found on token ids, so a judge need not say what it repeats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.data.tree import Layout, PromptTree, TreeBatch, collate_trees
from prefopt.errors import PrefoptError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Ids = tuple[int, ...]


def read_once(
    read: Callable[[Sequence[Ids]], Sequence[float]], sequences: Sequence[Ids]
) -> np.ndarray:
    """A number for each sequence, float64 [n]; equal ones are read once.

    They are read in an order of their own, so that the order of the arguments cannot matter.

    Args:
        read: Reads distinct sequences, sorted.
        sequences: [n].
    """
    distinct = sorted(set(sequences))
    numbers = dict(zip(distinct, read(distinct) if distinct else [], strict=True))
    return np.array([numbers[sequence] for sequence in sequences])


def read_last(
    model: PreTrainedModel,
    sequences: Sequence[Ids],
    numbers: Callable[[TreeBatch], Tensor],
    *,
    layout: Layout,
    batch_tokens: int,
    tree_size: int,
) -> list[float]:
    """Reads a number at the last token of each sequence.

    Args:
        model: A model after :func:`prefopt.models.forward.enable_trees`.
        sequences: Distinct, sorted, of two tokens or more, [n].
        numbers: One for each completion of a batch, [completions].
        layout: ``separate`` gives each sequence a row of its own.
        batch_tokens: Tokens a forward pass takes at most (one sequence may exceed it).
        tree_size: Sequences that share a tree at most.

    Raises:
        PrefoptError: A sequence is longer than the model's table of positions.
    """
    check_context(model, map(len, sequences))
    trees = prefix_trees(sequences, 1 if layout == "separate" else tree_size, batch_tokens)
    found: dict[Ids, float] = {}
    for batch in within_budget(trees, lambda tree: tree.num_tokens, batch_tokens):
        with torch.no_grad():
            values = numbers(collate_trees(batch, layout=layout).to(model.device)).tolist()
        read = [(*tree.prompt, *rest) for tree in batch for rest in tree.completions]
        found.update(zip(read, values, strict=True))
    return [found[sequence] for sequence in sequences]


def prefix_trees(sequences: Sequence[Ids], tree_size: int, max_tokens: int) -> list[PromptTree]:
    """Trees of neighbours with their common beginning as prompt, of the fewest tokens in all.

    Args:
        sequences: Distinct and sorted, so that those that begin alike are neighbours.
        tree_size: Sequences of a tree at most.
        max_tokens: Tokens of a tree of several sequences at most.

    Examples:
        >>> trees = prefix_trees([(1, 2, 3), (1, 2, 4), (5, 6)], tree_size=16, max_tokens=100)
        >>> [(tree.prompt, tree.completions) for tree in trees]
        [((1, 2), [(3,), (4,)]), ((5,), [(6,)])]
    """
    overlaps = [_overlap(*neighbours) for neighbours in pairwise(sequences)]
    best = [(0, 0, 0)]  # of the first n: tokens, where the last tree begins, what it shares
    for end in range(1, len(sequences) + 1):
        options, shared, total = [], len(sequences[end - 1]) - 1, 0
        for begin in range(end - 1, max(end - tree_size, 0) - 1, -1):
            alone = begin == end - 1
            shared = shared if alone else min(shared, overlaps[begin])
            total += len(sequences[begin])
            tokens = total - (end - begin - 1) * shared
            if not alone and (shared < 1 or tokens > max_tokens):
                break
            options.append((best[begin][0] + tokens, begin, shared))
        best.append(min(options))
    trees, end = [], len(sequences)
    while end:
        _, begin, shared = best[end]
        members = sequences[begin:end]
        trees.append(PromptTree(members[0][:shared], [ids[shared:] for ids in members]))
        end = begin
    return trees[::-1]


def _overlap(a: Ids, b: Ids) -> int:
    """What two neighbours begin with, in tokens; something is left of both."""
    same = enumerate(zip(a[:-1], b, strict=False))
    return next((i for i, (x, y) in same if x != y), len(a) - 1)


def within_budget(items: Iterable[T], size: Callable[[T], int], batch_tokens: int) -> list[list[T]]:
    """Items, longest first, in batches of at most so many tokens; a longer one stands alone.

    Args:
        items: What is to be read, in an order that decides between equal sizes.
        size: Tokens of an item.
        batch_tokens: The budget of a batch.
    """
    batches: list[list[T]] = []
    used = batch_tokens
    for item in sorted(items, key=lambda x: -size(x)):
        if used + size(item) > batch_tokens:
            batches.append([])
            used = 0
        batches[-1].append(item)
        used += size(item)
    return batches


def check_context(model: PreTrainedModel, lengths: Iterable[int]) -> None:
    """Looks for texts that are longer than a judge was made for.

    Rotary positions go on beyond that length, so such a model answers, and a warning says that it
    may be wrong; a model with a table of positions cannot.

    Args:
        model: The judge's model.
        lengths: Tokens of each text.

    Raises:
        PrefoptError: One is too long for a table of positions.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 0
    longest = max(lengths, default=0)
    if longest <= limit or limit <= 0:
        return
    problem = f"the judge reads {longest} tokens, but was made for {limit} at once"
    if not getattr(config, "rope_parameters", None):
        raise PrefoptError(f"{problem}; use shorter prompts and answers, or another judge")
    logger.warning("%s: its answer may be wrong", problem)
