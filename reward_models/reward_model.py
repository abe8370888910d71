"""The Bradley-Terry reward model as a judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.rows import Prompt
from prefopt.data.template import encode_answered, without_special_tokens
from prefopt.data.tree import Layout
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.load import load_reward_model, load_tokenizer
from prefopt.reward_models.reading import Ids, read_last, read_once


class ScoreJudge:
    """Answers both questions of a judge from one score: P(a beats b) = sigmoid(s(a) - s(b)).

    Scores of one call are read once per distinct (prompt, completion) and in an order of their own,
    so the order of the arguments cannot matter, and ``prefer(p, a, b) + prefer(p, b, a)`` is
    exactly 1. A subclass says how they are read.

    Args:
        tokenizer: The tokenizer, with the chat template the judge was trained with.
    """

    compares_only = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The score at the last token of each of some distinct, sorted sequences."""
        raise NotImplementedError

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The model's score of each answer, read at its EOS, float64 [n], without unit.

        Raises:
            PrefoptError: A prompt and its answer are longer than the model can read.
        """
        answers = without_special_tokens(self.tokenizer, completions)
        encoded = encode_answered(self.tokenizer, prompts, answers)
        return read_once(self.read, [tuple(ids) for ids in encoded])

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """P(a beats b) = sigmoid(score(a) - score(b)), float64 [n]."""
        scores = self.score([*prompts, *prompts], [*a, *b])
        return probability_of_beating(scores[: len(prompts)] - scores[len(prompts) :])


class RewardModel(ScoreJudge):
    """A reward model under transformers; answers to one prompt share its tokens on a tree.

    Args:
        model: A sequence classifier with one label, on the device where it is to run.
        tokenizer: Its tokenizer, with the chat template it was trained with.
        batch_tokens: Tokens a forward pass takes at most (one answer with its prompt may exceed
            it).
        tree_size: Answers that share a tree at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 8192,
        tree_size: int = 16,
    ) -> None:
        super().__init__(tokenizer)
        enable_trees(model)
        self.model = model.eval()
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

    def read(self, sequences: Sequence[Ids]) -> list[float]:
        """The score at the last token of each of some distinct, sorted sequences."""
        return read_last(
            self.model,
            sequences,
            lambda trees: self.model(trees=trees)["scores"],
            layout=self.layout,
            batch_tokens=self.batch_tokens,
            tree_size=self.tree_size,
        )


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
