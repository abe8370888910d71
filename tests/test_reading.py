"""Reading many token sequences: what shares a tree, and that sharing changes no number."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from prefopt.data.template import encode_answered, encode_completion, encode_prompt
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import next_token_log_probs, sequence_log_probs
from prefopt.reward_models.reading import Ids, prefix_trees, read_last, read_once
from prefopt.world.tokenizer import world_tokenizer

PROMPTS = [[{"role": "user", "content": text}] for text in ("how do cow sound ?", "dog cow ?")]


def sequences(count: int, seed: int = 0, alphabet: int = 3, longest: int = 6) -> list[Ids]:
    """Few different tokens, so that beginnings are shared and some contain others."""
    rng = random.Random(seed)
    found = {tuple(rng.choices(range(alphabet), k=rng.randint(2, longest))) for _ in range(count)}
    return sorted(found)


def members(trees: Sequence[PromptTree]) -> list[Ids]:
    return [(*tree.prompt, *rest) for tree in trees for rest in tree.completions]


def fewest_tokens(items: Sequence[Ids], tree_size: int, max_tokens: int) -> int:
    """Every way of cutting the sequence of items into trees, tried out."""
    if not items:
        return 0
    results = []
    for size in range(1, min(tree_size, len(items)) + 1):
        group = items[:size]
        shared = min(map(len, group)) - 1
        while len({ids[:shared] for ids in group}) > 1:
            shared -= 1
        tokens = shared + sum(len(ids) - shared for ids in group)
        if size == 1 or (shared and tokens <= max_tokens):
            results.append(tokens + fewest_tokens(items[size:], tree_size, max_tokens))
    return min(results)


@pytest.mark.parametrize(("tree_size", "max_tokens"), [(16, 1000), (3, 1000), (16, 9), (1, 1000)])
def test_trees_hold_everything_once_within_the_limits(tree_size: int, max_tokens: int) -> None:
    for seed in range(30):
        items = sequences(9, seed)
        trees = prefix_trees(items, tree_size, max_tokens)
        assert members(trees) == items
        assert max(len(tree.completions) for tree in trees) <= tree_size
        assert all(tree.num_tokens <= max_tokens for tree in trees if len(tree.completions) > 1)
        tokens = sum(tree.num_tokens for tree in trees)
        assert tokens == fewest_tokens(items, tree_size, max_tokens)


def test_two_levels_are_chosen_where_they_save_most() -> None:
    """Of all comparisons of four answers, those with the same first answer share it too."""
    context, answers = (1,) * 20, [(n,) * 10 for n in (2, 3, 4, 5)]
    items = sorted((*context, *a, *b) for a in answers for b in answers if a != b)
    trees = prefix_trees(items, 16, 1000)
    assert [len(tree.prompt) for tree in trees] == [30] * 4
    assert [len(tree.completions) for tree in trees] == [3] * 4
    stage = items[::4]  # each first answer once, as in a stage of a tournament
    [tree] = prefix_trees(stage, 16, 1000)
    assert len(tree.prompt) == 20
    assert prefix_trees([], 16, 1000) == []


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_sharing_changes_no_number(layout, tiny_llama) -> None:
    model = tiny_llama()
    enable_trees(model)
    candidates = (5, 9)
    items = sorted({(*ids, 7) for ids in sequences(40, alphabet=4, longest=30)})

    def first(trees):
        return next_token_log_probs(model, trees, candidates)[:, 0]

    def read(tree_size: int, batch_tokens: int, order: Sequence[int]) -> np.ndarray:
        asked = [items[i] for i in order]
        options = {"layout": layout, "batch_tokens": batch_tokens, "tree_size": tree_size}
        return read_once(lambda distinct: read_last(model, distinct, first, **options), asked)

    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in items]
    expected = torch.stack(logits).log_softmax(-1)[:, candidates[0]].numpy()
    assert np.ptp(expected) > 1, "the numbers must differ for this to mean anything"
    rows = random.Random(0).sample(range(len(items)), len(items))
    for tree_size, batch_tokens in ((16, 8192), (16, 100), (3, 8192), (1, 1)):
        found = read(tree_size, batch_tokens, range(len(items)))
        assert found == pytest.approx(expected, abs=2e-4)
        again = read(tree_size, batch_tokens, [*rows, rows[0]])
        assert (again == found[[*rows, rows[0]]]).all()


def test_candidates_are_read_as_if_they_were_appended(tiny_llama, random_trees) -> None:
    model, candidates = tiny_llama(), (5, 9, 11)
    enable_trees(model)
    trees = random_trees([3, 1])
    appended = [PromptTree(ids, [[token] for token in candidates]) for ids in members(trees)]
    with torch.no_grad():
        expected = sequence_log_probs(model, collate_trees(appended)).view(-1, len(candidates))
        found = next_token_log_probs(model, collate_trees(trees), candidates)
    assert found.shape == (4, 3)
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


def test_equal_prompts_are_encoded_together() -> None:
    tokenizer = world_tokenizer()
    prompts = [PROMPTS[0], "cow", PROMPTS[1], PROMPTS[0], "cow"]
    answers = ["moo .", "moo", "woof .", "baa .", "quack"]
    expected = [
        encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert encode_answered(tokenizer, prompts, answers) == expected
    assert encode_answered(tokenizer, [], []) == []
    with pytest.raises(PrefoptError, match="stop token '<eos>' before its end"):
        encode_answered(tokenizer, prompts[:1], ["moo <eos> woof"])
