"""What a trainer or an evaluation may ask a judge; the judges themselves are in reward_models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from prefopt.data.rows import Prompt


@runtime_checkable
class Judge(Protocol):
    """Turns prompts and completions into feedback.

    A judge keeps its own tokenizer and chat template; prompts and completions reach it as text.
    Batch size, order and padding never change an answer. A judge that cannot answer one of the two
    questions raises ``PrefoptError`` saying so.

    A judge may have a class attribute ``compares_only``: True says that its scores mean something
    among the samples of one prompt only, such as a mean win rate. Where it is absent it is False.
    Trainers know a judge's weights by its ``model`` or, where it holds no torch module, by
    ``fingerprint``, a hash; PPO's critic begins as ``model`` or as what ``load_model()`` returns.
    """

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """A score per (prompt, completion), float [n], in the judge's unit; higher is better."""
        ...

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """P(a beats b) per prompt, in [0, 1], float [n]; swapping a and b gives 1 minus it."""
        ...
