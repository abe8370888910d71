"""Any Python function as a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError

RewardFunction = Callable[..., Sequence[float | None]]


class RuleJudge:
    """Judges by a function with the signature of TRL's reward functions.

    Args:
        function: ``function(prompts=..., completions=..., **columns)`` returning a number per
            completion.
    """

    compares_only = False

    def __init__(self, function: RewardFunction) -> None:
        self.function = function

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """The function's values, float64 [n].

        Raises:
            PrefoptError: The function returned too few values, or None for a completion.
        """
        values = self.function(prompts=list(prompts), completions=list(completions), **columns)
        if len(values) != len(completions) or any(value is None for value in values):
            missing = sum(value is None for value in values)
            raise PrefoptError(
                f"rule judge {getattr(self.function, '__name__', self.function)}: expected "
                f"{len(completions)} numbers, found {len(values)} values, {missing} of them None"
            )
        return np.array(values, dtype=np.float64)

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """1 where a scores higher, 0 where b does, 1/2 at a tie; float64 [n]."""
        return (np.sign(self.score(prompts, a) - self.score(prompts, b)) + 1) / 2
