"""Resets to a dataset: samples that begin with a part of an offline answer.

Dataset reset policy optimisation: Chang, Zhan et al., arXiv 2404.08495. A sample is reset with a
given probability; the part of the answer it begins with has 1 to ``length - 1`` tokens, uniformly,
so that a reset forces at least one token and leaves at least the last to the policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from prefopt.data.template import find_stop
from prefopt.rollout.engine import Completion, SamplingSettings, make_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.data.tokenize import Ragged


@dataclass(frozen=True)
class Resets:
    """How samples are reset.

    Attributes:
        answers: The offline answer of each row as token ids, its stop token included.
        probability: That a sample is reset.
        tokenizer: Decodes answers.
        stop_token_ids: Tokens that end a completion.
    """

    answers: Ragged
    probability: float
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: Sequence[int]

    def begin(
        self, row: int, settings: SamplingSettings
    ) -> list[tuple[list[int], SamplingSettings]]:
        """What each sample of a row is forced to begin with, and how it is to go on.

        Args:
            row: Row of ``answers``.
            settings: ``max_new_tokens`` limits the whole answer.

        Returns:
            For each sample its forced tokens and the settings of its own, under which the prompt
            with the forced tokens is continued.
        """
        samples = []
        for number in range(settings.samples_per_prompt):
            one = replace(
                settings, samples_per_prompt=1, first_sample=settings.first_sample + number
            )
            forced = list(self.answers[row][: self._length(row, one)])
            limit = settings.max_new_tokens - len(forced)
            samples.append((forced, replace(one, max_new_tokens=limit)))
        return samples

    def _length(self, row: int, settings: SamplingSettings) -> int:
        # a stop token before the end would end the answer in the middle of its forced part
        stop = find_stop(self.answers[row], frozenset(self.stop_token_ids))
        return reset_length(
            f"{settings.seed}/{settings.first_sample}/{row}",
            len(self.answers[row]) if stop is None else stop + 1,
            probability=self.probability,
            limit=settings.max_new_tokens,
        )

    def whole(self, forced: Sequence[int], answer: Completion) -> Completion:
        """An answer with its forced part in front, whose log-prob is not the sampler's."""
        if not forced:
            return answer
        whole = [*forced, *answer.token_ids]
        completion = make_completion(whole, self.stop_token_ids, self.tokenizer)
        return replace(completion, log_prob=answer.log_prob)


def reset_length(key: str, length: int, *, probability: float, limit: int) -> int:
    """How many tokens of an offline answer a sample begins with; 0 is no reset.

    Args:
        key: Seeds the choice.
        length: Tokens of the answer, its stop token included.
        probability: That the sample is reset at all.
        limit: The most tokens an answer may have; what is beyond is not looked at.
    """
    source = Random(key)
    length = min(length, limit)
    if length < 2 or source.random() >= probability:
        return 0
    return source.randint(1, length - 1)
