"""The tree builder, for any lengths: what predicts which token, and what it may see."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from fuzz.target import Target, attempt
from prefopt.data.tree import PromptTree, TreeBatch, collate_trees
from prefopt.errors import PrefoptError
from prefopt.trainers.guards import unpack_trees

# mostly short; ids that occur twice must not be told apart by their value
tokens = st.integers(0, 5) | st.integers(0, 2**31 - 1)
ids = st.lists(tokens, min_size=1, max_size=6) | st.integers(1, 60).map(lambda n: [7] * n)
trees = st.builds(PromptTree, ids, st.lists(ids, min_size=1, max_size=5))
layouts = st.fixed_dictionaries(
    {
        "layout": st.sampled_from(["tree", "separate"]),
        "max_row_tokens": st.none() | st.integers(1, 80),
        "padding_side": st.sampled_from(["left", "right"]),
        "pad_to_multiple_of": st.integers(1, 9),
    }
)


def build(case: tuple[list[PromptTree], dict[str, Any]]) -> None:
    """Every completion token is predicted once, from the position before it, in its own context."""
    packed, options = case
    batch = collate_trees(packed, **options)
    assert unpack_trees(batch) == packed
    width, limit = batch.input_ids.shape[1], options["max_row_tokens"]
    assert width % options["pad_to_multiple_of"] == 0
    completions = [(n, tree.prompt, c) for n, tree in enumerate(packed) for c in tree.completions]
    assert batch.tree_of.tolist() == [n for n, _, _ in completions]
    assert batch.lengths.tolist() == [len(c) for _, _, c in completions]
    assert batch.targets.tolist() == [token for _, _, c in completions for token in c]
    owners = [k for k, (_, _, c) in enumerate(completions) for _ in c]
    assert batch.owner.tolist() == owners
    assert batch.sum_per_completion(batch.targets.double()).tolist() == [
        float(sum(c)) for _, _, c in completions
    ]
    if options["layout"] == "tree" and limit is not None:
        for row in batch.input_ids:
            fits = width - limit < options["pad_to_multiple_of"]
            assert fits or max(t.num_tokens for t in packed) > limit, row
    check_contexts(batch, completions)


def check_contexts(batch: TreeBatch, completions: list[tuple[int, Any, Any]]) -> None:
    """A completion token's context is its prompt and what precedes it, at positions 0, 1, 2, ..."""
    flat = batch.input_ids.flatten().tolist()
    positions = batch.position_ids.flatten().tolist()
    seen = _visible(batch)
    first = 0
    for number, (_, prompt, completion) in enumerate(completions):
        places = batch.predict_from[first : first + len(completion)].tolist()
        whole = [*prompt, *completion]
        for done, place in enumerate(places):
            context = seen[place]
            assert [flat[p] for p in context] == whole[: len(prompt) + done]
            assert [positions[p] for p in context] == list(range(len(prompt) + done))
        last = int(batch.last[number])
        assert [flat[p] for p in seen[last]] == whole
        first += len(completion)


def _visible(batch: TreeBatch) -> dict[int, list[int]]:
    """What each real position may attend to, by flat position; one belongs to one segment only."""
    width = batch.input_ids.shape[1]
    seen: dict[int, list[int]] = {}
    if batch.attention_mask is not None:
        assert not batch.segments
        for r, row in enumerate(batch.attention_mask.tolist()):
            assert row == sorted(row, reverse=True)
            for n in range(sum(row)):
                seen[r * width + n] = list(range(r * width, r * width + n + 1))
        return seen
    for segment in batch.segments:
        prefix = range(segment.prefix_start, segment.prefix_start + segment.prefix_length)
        assert segment.start // width == segment.prefix_start // width
        for n in range(segment.start, segment.start + segment.length):
            assert n not in seen
            seen[n] = [*prefix, *range(segment.start, n + 1)]
    assert list(seen) == sorted(seen)
    return seen


TREES = Target(st.tuples(st.lists(trees, min_size=1, max_size=4), layouts), build)


def refuse(case: tuple[list[int], list[list[int]]]) -> None:
    """A tree without a prompt, or with an empty completion, is refused."""
    prompt, completions = case
    tree = attempt(PromptTree, prompt, completions)
    good = bool(prompt and completions and all(completions))
    assert isinstance(tree, PrefoptError) != good


_any_ids = st.lists(tokens, max_size=2)
TREE_PARTS = Target(st.tuples(_any_ids, st.lists(_any_ids, max_size=3)), refuse)
