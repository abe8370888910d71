"""What one sample is asked of vLLM with, in this process or on a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import Completion, Done, SamplingSettings, sample_key

TEMPERATURES = (0.01, 2.0)  # vLLM raises what is below and refuses what is above


def sampling_options(
    prompt: Sequence[int], settings: SamplingSettings, sample: int, stop_token_ids: Sequence[int]
) -> dict[str, Any]:
    """The options of one sample, under the names that vLLM's parameters and its API share.

    Args:
        prompt: Token ids.
        settings: How to draw it.
        sample: Its index among the samples of the prompt.
        stop_token_ids: Tokens that end a completion; no others do.
    """
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_tokens": settings.max_new_tokens,
        "seed": sample_key(settings.seed, prompt, sample) % 2**63,  # vLLM takes no more bits
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,
        "logprobs": 0,  # the drawn token's only
    }


class Gathered:
    """The completions of a call, which come in any order, each prompt told of as it is finished.

    Args:
        settings: Those of each prompt.
        done: As for ``Engine.generate``.

    Attributes:
        completions: Of each prompt that is finished, in the order of its samples.
    """

    def __init__(self, settings: Sequence[SamplingSettings], done: Done | None) -> None:
        self.completions: list[list[Completion]] = [[] for _ in settings]
        self._settings, self._done = settings, done
        self._found: list[dict[int, Completion]] = [{} for _ in settings]

    def add(self, index: int, sample: int, completion: Completion) -> None:
        """Takes one sample of a prompt."""
        found = self._found[index]
        found[sample] = completion
        if len(found) == self._settings[index].samples_per_prompt:
            self.completions[index] = [found[number] for number in sorted(found)]
            if self._done is not None:
                self._done(index, self.completions[index])


def check_temperatures(settings: Sequence[SamplingSettings]) -> None:
    """Checks that vLLM would sample at these temperatures and no others.

    Raises:
        PrefoptError: It would not.
    """
    least, most = TEMPERATURES
    for one in settings:
        if one.temperature != 0 and not least <= one.temperature <= most:
            raise PrefoptError(
                f"sampling: temperature is {one.temperature:g}, expected 0 (greedy) or {least:g} "
                f"to {most:g}, which is what vLLM can sample at; change it, or use rollout.engine "
                "transformers"
            )


def whole_distribution(settings: SamplingSettings) -> bool:
    """Whether nothing is cut off, so that vLLM's log-prob of a token is that of its softmax."""
    return settings.temperature == 0 or (settings.top_p == 1 and settings.top_k == 0)
