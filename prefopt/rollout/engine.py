"""What a generation engine is asked and what it answers, and the parts every engine shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from prefopt.errors import PrefoptError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        max_new_tokens: The most tokens a completion may have, its stop token included.
        temperature: Divisor of the logits; 0 takes the most likely token (greedy).
        top_p: Keep the smallest set of most likely tokens whose probability reaches this; 1 is all.
        top_k: Keep this many most likely tokens, and ties with the last of them; 0 is all.
        samples_per_prompt: Completions for each prompt.
        seed: Selects the noise. Equal seed, prompt and sample index give an equal sample.
        first_sample: Index of the first sample, so that 4 samples from index 4 are the second half
            of 8 samples from index 0.

    Raises:
        PrefoptError: If a value is out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    samples_per_prompt: int = 1
    seed: int = 0
    first_sample: int = 0

    def __post_init__(self) -> None:
        for name, least in {
            "max_new_tokens": 1,
            "top_k": 0,
            "samples_per_prompt": 1,
            "seed": 0,
            "first_sample": 0,
        }.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise PrefoptError(
                    f"sampling: {name} is {value!r}, expected a whole number of at least {least}"
                )
        if not (_is_number(self.temperature) and _is_temperature(self.temperature)):
            raise PrefoptError(
                f"sampling: temperature is {self.temperature!r}, expected 0 (greedy) or a number "
                f"of at least {MIN_TEMPERATURE:g}"
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise PrefoptError(
                f"sampling: top_p is {self.top_p!r}, expected a number above 0 and at most 1"
            )


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_temperature(value: float) -> bool:
    return value == 0 or MIN_TEMPERATURE <= value < math.inf


@dataclass(frozen=True)
class Completion:
    """One answer of the model.

    Attributes:
        token_ids: The tokens the model produced, its stop token included.
        text: The same tokens as text, without special tokens.
        finish_reason: "stop" if the last token is a stop token, "length" if the limit was reached.
        log_prob: Sum over its tokens of their log-probs under softmax(logits / temperature), as the
            engine that drew them computed it, before top_k and top_p cut anything off; of a greedy
            completion, at temperature 1. In nats; NaN where the engine does not say. It takes no
            part in comparisons, being equal up to float rounding only.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    log_prob: float = field(default=math.nan, compare=False)


# told of a prompt's number and its completions, once for each prompt, as soon as it has them all
Done = Callable[[int, list["Completion"]], None]


class Engine(Protocol):
    """Anything that continues prompts.

    Attributes:
        continuous: Whether the engine refills its batch as completions end, so that one call for
            everything there is to sample serves it best.
    """

    continuous: bool

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Draws completions.

        Args:
            prompts: Token ids of each prompt, special tokens included. Two equal prompts with
                equal settings get equal samples: for more answers, ask for more samples.
            settings: How to draw them: the same for all prompts, or one for each.
            done: Told of every prompt that is finished, in whatever order that happens.

        Returns:
            For each prompt, in the order given, its ``samples_per_prompt`` completions.

        Raises:
            PrefoptError: If a prompt is empty, or too long for the model's context.
        """
        ...


class PushedEngine(Engine, Protocol):
    """An engine with weights of its own, which are sent to it before it samples.

    Attributes:
        elsewhere: Whether it computes on other devices than training, and may do so meanwhile.
    """

    elsewhere: bool

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights; what was cached of older ones is forgotten.

        Args:
            weights: Every weight under its Hugging Face name, whole, tied ones too. Making them may
                take all processes, so they are iterated over to the end whatever the engine does.

        Raises:
            PrefoptError: They cannot be taken over.
        """
        ...

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        """The engine's log-prob of every token but the first, given those before it.

        Args:
            sequences: Token ids, two or more each.

        Returns:
            From each place that holds weights, one engine or all servers: for each sequence, one
            number in nats for each of its tokens from the second on, under softmax(logits).
        """
        ...

    def release(self) -> None:
        """Gives the device's memory back until the next push, where the engine is on it."""
        ...


def settings_of_each(
    settings: SamplingSettings | Sequence[SamplingSettings], count: int
) -> list[SamplingSettings]:
    """The settings of each of ``count`` prompts."""
    if isinstance(settings, SamplingSettings):
        return [settings] * count
    if len(settings) != count:
        raise PrefoptError(f"sampling: found {len(settings)} settings for {count} prompts")
    return list(settings)


def sample_key(seed: int, prompt: Sequence[int], sample: int) -> int:
    """The 128-bit key of one sample's noise: a hash of what identifies the sample, nothing else.

    Args:
        seed: The seed of the settings.
        prompt: Token ids of the prompt.
        sample: Index of the sample among those of its prompt.

    Returns:
        A whole number below 2**128, the same on every machine.
    """
    digest = blake2b(f"{seed} {sample} ".encode(), digest_size=16)
    digest.update(np.asarray(prompt, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little")


def uniforms(key: int, count: int) -> np.ndarray:
    """The first ``count`` uniform numbers of a key: midpoints of 2**23 equal cells of (0, 1).

    A midpoint is exact in float32 and never 0 or 1, so no token is drawn for standing first or
    last. A longer request starts with the numbers of a shorter one.

    Args:
        key: The generator's key, below 2**128.
        count: How many numbers.

    Returns:
        float32 [count].
    """
    cells = np.random.Philox(key=key).random_raw(count) >> np.uint64(41)
    return (cells.astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def check_prompts(
    prompts: Sequence[Sequence[int]],
    settings: Sequence[SamplingSettings],
    context_length: int | None,
) -> None:
    """Checks that every prompt can be continued.

    Args:
        prompts: Token ids of each prompt.
        settings: Those of each prompt.
        context_length: Tokens the model can see at once; None if it has no such limit.

    Raises:
        PrefoptError: If a prompt is empty, or leaves less than ``max_new_tokens`` of the context.
    """
    for index, (prompt, each) in enumerate(zip(prompts, settings, strict=True)):
        if len(prompt) == 0:
            raise PrefoptError(f"prompt {index} is empty: expected at least one token id")
        if context_length is not None and len(prompt) + each.max_new_tokens > context_length:
            raise PrefoptError(
                f"prompt {index} has {len(prompt)} tokens: with max_new_tokens="
                f"{each.max_new_tokens} it exceeds the model's context of {context_length}; drop "
                "the prompt or lower max_new_tokens"
            )


def make_completion(
    token_ids: Sequence[int],
    stop_token_ids: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
    log_probs: Sequence[float] | None = None,
) -> Completion:
    """Ends a completion after its first stop token and decodes it.

    Args:
        token_ids: Tokens after the prompt; whatever follows the first stop token is dropped.
        stop_token_ids: Tokens that end a completion.
        tokenizer: Decodes the tokens.
        log_probs: The log-prob of each token, in nats, if known.

    Returns:
        The completion, with ``finish_reason`` "length" if there is no stop token.
    """
    stop = next((i for i, token in enumerate(token_ids) if token in stop_token_ids), None)
    kept = list(token_ids if stop is None else token_ids[: stop + 1])
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    log_prob = math.nan if log_probs is None else math.fsum(log_probs[: len(kept)])
    return Completion(kept, text, "length" if stop is None else "stop", log_prob)
