"""The layout of prompt trees: which token lies where, what predicts it and what it may see."""

from __future__ import annotations

import pytest
import torch

from prefopt.data.tree import PromptTree, Segment, collate_trees
from prefopt.errors import PrefoptError

TWO = [PromptTree([10, 11, 12], [[20, 21], [30]]), PromptTree([40], [[50, 51, 52]])]


def test_one_row_by_hand() -> None:
    batch = collate_trees(TWO)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 40, 50, 51, 52]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 3]]
    assert batch.predict_from.tolist() == [2, 3, 2, 6, 7, 8]
    assert batch.targets.tolist() == [20, 21, 30, 50, 51, 52]
    assert batch.owner.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.last.tolist() == [4, 5, 9]
    assert batch.lengths.tolist() == [2, 1, 3]
    assert batch.tree_of.tolist() == [0, 0, 1]
    assert (batch.num_trees, batch.num_completions, batch.attention_mask) == (2, 3, None)
    assert batch.segments == (
        Segment(0, 3, 0, 0),
        Segment(3, 2, 0, 3),
        Segment(5, 1, 0, 3),
        Segment(6, 1, 6, 0),
        Segment(7, 3, 6, 1),
    )


def test_two_rows_padded_on_the_left_by_hand() -> None:
    batch = collate_trees(TWO, max_row_tokens=6, padding_side="left", pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [
        [0, 0, 10, 11, 12, 20, 21, 30],
        [0, 0, 0, 0, 40, 50, 51, 52],
    ]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2, 3, 4, 3], [0, 0, 0, 0, 0, 1, 2, 3]]
    assert batch.predict_from.tolist() == [4, 5, 4, 12, 13, 14]
    assert batch.last.tolist() == [6, 7, 15]
    assert batch.segments[-1] == Segment(13, 3, 12, 1)


def test_separate_rows_by_hand() -> None:
    batch = collate_trees(TWO, layout="separate")
    assert batch.input_ids.tolist() == [
        [10, 11, 12, 20, 21],
        [10, 11, 12, 30, 0],
        [40, 50, 51, 52, 0],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert batch.predict_from.tolist() == [2, 3, 7, 10, 11, 12]
    assert batch.targets.tolist() == [20, 21, 30, 50, 51, 52]
    assert (batch.tree_of.tolist(), batch.num_trees, batch.segments) == ([0, 0, 1], 2, ())


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("max_row_tokens", [None, 1, 25, 60])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_every_completion_can_be_read_back(random_trees, layout, max_row_tokens, padding_side):
    trees = random_trees([1, 2, 3, 8, 1, 5], seed=max_row_tokens or 0)
    batch = collate_trees(
        trees,
        layout=layout,
        max_row_tokens=max_row_tokens,
        padding_side=padding_side,
        pad_to_multiple_of=8,
    )
    flat, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    pairs = [(i, tree, c) for i, tree in enumerate(trees) for c in tree.completions]
    assert batch.input_ids.shape[1] % 8 == 0
    assert batch.num_completions == len(pairs)
    for number, (tree_number, tree, completion) in enumerate(pairs):
        sources = batch.predict_from[batch.owner == number]
        assert batch.targets[batch.owner == number].tolist() == list(completion)
        assert flat[sources].tolist() == [tree.prompt[-1], *completion[:-1]]
        size = len(tree.prompt)
        assert positions[sources].tolist() == [*range(size - 1, size - 1 + len(completion))]
        assert flat[batch.last[number]] == completion[-1]
        assert batch.lengths[number] == len(completion)
        assert batch.tree_of[number] == tree_number
        row = batch.last[number] // batch.input_ids.shape[1]
        assert (sources // batch.input_ids.shape[1] == row).all(), "a tree never spans two rows"


def test_segments_are_the_trees_and_overlap_nowhere(random_trees) -> None:
    trees = random_trees([3, 1, 4, 2])
    batch = collate_trees(trees, max_row_tokens=50)
    flat, used = batch.input_ids.flatten(), []
    expected = [(list(t.prompt), c) for t in trees for c in ([], *t.completions)]
    for segment, (prompt, completion) in zip(batch.segments, expected, strict=True):
        own = flat[segment.start : segment.start + segment.length].tolist()
        prefix = flat[segment.prefix_start : segment.prefix_start + segment.prefix_length].tolist()
        assert (prefix, own) == ((prompt, completion) if completion else ([], prompt))
        used.extend(range(segment.start, segment.start + segment.length))
    assert used == sorted(set(used))
    assert len(used) == sum(t.num_tokens for t in trees)
    assert (flat != 0).sum() == len(used), "what no segment covers is padding"


def test_rows_fill_up_to_the_limit_and_no_further() -> None:
    trees = [PromptTree([1] * n, [[2]]) for n in (3, 3, 4, 20, 1)]  # 4, 4, 5, 21 and 2 tokens
    rows = collate_trees(trees, max_row_tokens=8).input_ids
    assert [(row != 0).sum().item() for row in rows] == [8, 5, 21, 2]


def test_sums_per_completion_keep_gradients_apart() -> None:
    batch = collate_trees(TWO)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    sums = batch.sum_per_completion(values)
    assert sums.tolist() == [3.0, 4.0, 56.0]
    sums[2].backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 0, 1, 1, 1]


def test_moving_a_batch_moves_its_tensors_and_keeps_the_rest() -> None:
    batch = collate_trees(TWO)
    moved = batch.to("meta")
    assert moved.input_ids.is_meta
    assert moved.owner.is_meta
    assert (moved.segments, moved.num_trees) == (batch.segments, 2)
    assert moved.attention_mask is None
    assert not batch.input_ids.is_meta


@pytest.mark.parametrize(
    ("prompt", "completions"), [([], [[1]]), ([1], []), ([1], [[2], []])], ids=str
)
def test_a_tree_without_tokens_is_refused(prompt, completions) -> None:
    with pytest.raises(PrefoptError, match=f"a prompt of {len(prompt)}") as caught:
        PromptTree(prompt, completions)
    assert "\n" not in str(caught.value)
