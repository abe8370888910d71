"""Preference pairs as the trees that trainers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from prefopt.data.rows import parse_pair, validate
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import TokenizedPairs, tokenize_pairs
from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.trainers.base import TreeDataset, TreeTrainerConfig

PairSource = TreeDataset | Iterable[dict[str, Any]] | None


class LazyTrees(Sequence[PromptTree]):
    """Trees that are made when they are asked for.

    Args:
        length: How many there are.
        make: Makes the tree of an index.
    """

    def __init__(self, length: int, make: Callable[[int], PromptTree]) -> None:
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> PromptTree: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptTree]: ...
    def __getitem__(self, index: int | slice) -> PromptTree | list[PromptTree]:
        here = range(self.length)[index]
        return self.make(here) if isinstance(here, int) else [self.make(i) for i in here]


def pair_dataset(pairs: TokenizedPairs) -> TreeDataset:
    """The data set of a trainer on pairs: trees of two completions, the chosen one first.

    The columns ``p_chosen`` (soft labels) and ``margin`` are there only if some row says something
    other than 1 and 0.
    """

    def tree(index: int) -> PromptTree:
        completions = (pairs.chosen_ids[index], pairs.rejected_ids[index])
        return PromptTree(pairs.prompt_ids[index], completions)

    columns: dict[str, Sequence[float]] = {}
    if any(p != 1.0 for p in pairs.p_chosen):
        columns["p_chosen"] = pairs.p_chosen
    if any(m != 0.0 for m in pairs.margin):
        columns["margin"] = pairs.margin
    return TreeDataset(LazyTrees(len(pairs), tree), columns)


def as_trees(
    args: TreeTrainerConfig,
    train_dataset: PairSource,
    kwargs: dict[str, Any],
    *,
    tokenize: Callable[..., Any] = tokenize_pairs,
    dataset_of: Callable[[Any], TreeDataset] = pair_dataset,
) -> dict[str, Any]:
    """A trainer's keyword arguments, with data sets of rows made into trees.

    Args:
        args: The limits on lengths.
        train_dataset: Rows of preference pairs (docs/data.md) or ready trees.
        kwargs: The trainer's other arguments; ``processing_class`` tokenises.
        tokenize: What makes token ids of the parsed pairs.
        dataset_of: What makes a data set of its result.

    Raises:
        PrefoptError: A row is wrong, none is short enough, or there is no tokenizer for rows.
    """
    tokenizer = kwargs.get("processing_class")
    datasets = {"train_dataset": train_dataset, "eval_dataset": kwargs.get("eval_dataset")}
    for name, rows in datasets.items():
        if rows is None or isinstance(rows, TreeDataset):
            continue
        if tokenizer is None:
            raise PrefoptError(f"{name} holds rows of text: pass a tokenizer as processing_class")
        located = ((f"{name}:{i}", row) for i, row in enumerate(rows, start=1))
        pairs, _ = validate(located, parse_pair)
        check_tokenizer(tokenizer, conversational=not isinstance(pairs[0].prompt, str))
        limits = {"max_prompt_length": args.max_prompt_length, "max_length": args.max_length}
        datasets[name] = dataset_of(tokenize(pairs, tokenizer, **limits))
    return kwargs | datasets
