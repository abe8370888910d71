"""The Bradley-Terry reward model as a judge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.rows import Prompt
from prefopt.data.template import encode_completion, encode_prompt, without_special_tokens
from prefopt.data.tree import Layout, PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.load import load_reward_model, load_tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")


class RewardModel:
    """Answers both questions of a judge from one score: P(a beats b) = sigmoid(s(a) - s(b)).

    Equal prompts share their tokens on a tree. Scores of one call are computed once per distinct
    (prompt, completion) and in an order of their own, so the order of the arguments cannot matter,
    and ``prefer(p, a, b) + prefer(p, b, a)`` is exactly 1.

    Args:
        model: A sequence classifier with one label, on the device where it is to run.
        tokenizer: Its tokenizer, with the chat template it was trained with.
        batch_tokens: Tokens a forward pass takes at most (one tree may exceed it).
        tree_size: Completions of one prompt that share a tree at most.
    """

    compares_only = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 8192,
        tree_size: int = 16,
    ) -> None:
        enable_trees(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_tokens, self.tree_size = batch_tokens, tree_size
        self.layout: Layout = "tree" if supports_tree_attention(model) else "separate"

    @classmethod
    def from_pretrained(
        cls, path: str, *, dtype: str = "auto", device: str | torch.device | None = None
    ) -> RewardModel:
        """Loads a reward model that prefopt, TRL or transformers saved.

        Args:
            path: A local folder or a Hub id.
            dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
            device: Where to run; a GPU when there is one.

        Raises:
            PrefoptError: Nothing can be loaded from ``path``.
        """
        tokenizer = load_tokenizer(path)
        model = load_reward_model(path, tokenizer, dtype=dtype)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The model's score of each answer, read at its EOS, float64 [n], without unit.

        Raises:
            PrefoptError: A prompt and its answer are longer than the model's table of positions.
        """
        encoded = [
            self._encode(prompt, completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        check_context(self.model, (len(prompt) + len(answer) for prompt, answer in encoded))
        scores: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for batch in self._batches(sorted(set(encoded))):
            trees = collate_trees(batch, layout=self.layout).to(self.model.device)
            with torch.no_grad():
                values = self.model(trees=trees)["scores"].tolist()
            keys = [
                (tuple(tree.prompt), tuple(answer)) for tree in batch for answer in tree.completions
            ]
            scores.update(zip(keys, values, strict=True))
        return np.array([scores[key] for key in encoded])

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """P(a beats b) = sigmoid(score(a) - score(b)), float64 [n]."""
        scores = self.score([*prompts, *prompts], [*a, *b])
        return probability_of_beating(scores[: len(prompts)] - scores[len(prompts) :])

    def _encode(self, prompt: Prompt, completion: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        text = without_special_tokens(self.tokenizer, completion)
        answer = encode_completion(self.tokenizer, prompt, text, finished=True)
        return tuple(encode_prompt(self.tokenizer, prompt)), tuple(answer)

    def _batches(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[PromptTree]]:
        """Trees of equal prompts, longest first, in batches within the token budget."""
        groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for prompt, answer in pairs:
            groups.setdefault(prompt, []).append(answer)
        trees = [
            PromptTree(prompt, answers[i : i + self.tree_size])
            for prompt, answers in groups.items()
            for i in range(0, len(answers), self.tree_size)
        ]
        return within_budget(trees, lambda tree: tree.num_tokens, self.batch_tokens)


def within_budget(items: Iterable[T], size: Callable[[T], int], batch_tokens: int) -> list[list[T]]:
    """Items, longest first, in batches of at most so many tokens; a longer one stands alone.

    Args:
        items: What is to be judged, in an order that decides between equal sizes.
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


def probability_of_beating(difference: np.ndarray) -> np.ndarray:
    """sigmoid of score differences; that of ``-x`` is exactly 1 minus that of ``x``.

    Args:
        difference: Score differences, [n].

    Raises:
        PrefoptError: A difference is not a number.
    """
    if np.isnan(difference).any():
        raise PrefoptError(
            f"{int(np.isnan(difference).sum())} of {difference.size} scores are NaN; check the "
            "reward model's weights and precision"
        )
    upper = 1 / (1 + np.exp(-np.abs(difference)))  # in [1/2, 1], so that 1 - upper is exact
    return np.where(difference >= 0, upper, 1 - upper)
