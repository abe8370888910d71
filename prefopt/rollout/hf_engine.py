"""Generation with transformers, with noise that belongs to the sample instead of the batch.

Every position of every sample has one uniform number, from a counter-based generator (Philox;
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the seed, the prompt
and the sample index, and the token is the inverse of the cumulative distribution at that number.
So batch size, order, padding and the number of processes change a sample by float rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefopt.data import template
from prefopt.errors import PrefoptError
from prefopt.models.forward import unwrap_peft
from prefopt.rollout.engine import (
    Completion,
    Done,
    SamplingSettings,
    check_prompts,
    make_completion,
    sample_key,
    settings_of_each,
    uniforms,
)
from prefopt.rollout.kv_cache import keep_rows, roomy_cache

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

SHARE_ENDED = 0.25  # of a batch; rows that have ended leave it then


class TransformersEngine:
    """Draws completions with ``model.generate``, from the weights the model has at that moment.

    Args:
        model: A causal language model, PEFT-wrapped or not. Only during a call is it in evaluation
            mode (so that gradient checkpointing does not switch its cache off) and without its own
            ``generation_config`` (so that no sampling default of the checkpoint takes part).
        tokenizer: Decodes completions.
        stop_token_ids: Tokens that end a completion; by default the tokenizer's EOS and those of
            the model's ``generation_config``. An empty sequence means never to stop early.
        batch_size: Completions drawn at once.

    Raises:
        PrefoptError: If ``batch_size`` is less than 1.
    """

    continuous = False

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int] | None = None,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise PrefoptError(f"generation: batch_size is {batch_size}, expected at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        if stop_token_ids is None:
            stop_token_ids = template.stop_token_ids(tokenizer, model.generation_config)
        self.stop_token_ids = list(stop_token_ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Draws completions; see ``Engine.generate``.

        Raises:
            PrefoptError: If a prompt is empty or too long for the model's context, or if the
                model's logits are not finite.
        """
        context_length = getattr(
            self.model.config.get_text_config(), "max_position_embeddings", None
        )
        each = settings_of_each(settings, len(prompts))
        check_prompts(prompts, each, context_length)
        # Longest first: little padding, and what does not fit in memory fails at once.
        order = sorted(range(len(prompts)), key=lambda i: (_kind(each[i]), -len(prompts[i])))
        rows = [
            _Row(index, prompts[index], sample, each[index])
            for index in order
            for sample in range(
                each[index].first_sample,
                each[index].first_sample + each[index].samples_per_prompt,
            )
        ]
        completions: list[list[Completion]] = [[] for _ in prompts]
        with _ready_to_generate(self.model):
            for batch in self._batches(rows, context_length):
                for row, (token_ids, log_probs) in zip(batch, self._continue(batch), strict=True):
                    ids = token_ids[: row.settings.max_new_tokens]
                    found = completions[row.index]
                    found.append(
                        make_completion(ids, self.stop_token_ids, self.tokenizer, log_probs)
                    )
                    if done is not None and len(found) == row.settings.samples_per_prompt:
                        done(row.index, found)
        return completions

    def _batches(self, rows: Sequence[_Row], context_length: int | None) -> Iterator[list[_Row]]:
        """Rows in order; a row that has ended may be carried on with the others of its batch, and
        must not outgrow a table of positions in the meantime.
        """
        batch: list[_Row] = []
        longest = most = 0
        for row in rows:
            length, limit = len(row.prompt), row.settings.max_new_tokens
            outgrown = max(longest, length) + max(most, limit) > (context_length or math.inf)
            other = batch and _kind(batch[0].settings) != _kind(row.settings)
            if batch and (len(batch) == self.batch_size or outgrown or other):
                yield batch
                batch, longest, most = [], 0, 0
            batch.append(row)
            longest, most = max(longest, length), max(most, limit)
        if batch:
            yield batch

    def _continue(self, batch: Sequence[_Row]) -> list[tuple[list[int], list[float]]]:
        """The tokens after each prompt and their log-probs; behind an end, anything.

        Rows that have ended leave the batch once they are a quarter of it.
        """
        prompts, limits = [r.prompt for r in batch], [r.settings.max_new_tokens for r in batch]
        ids, mask = _left_padded(prompts, self.model.device)
        width = ids.shape[1]
        cache = self._read(prompts, ids, mask)
        draw = _Draw(batch, width, self.model.device)
        found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        rows = list(range(len(prompts)))
        while rows:
            draw.rows, draw.log_probs = rows, []
            ends = _Ends(ids, [width + limits[row] for row in rows], self.stop_token_ids)
            drawn = self._generate(
                ids,
                mask,
                cache,
                max_new_tokens=width + max(limits[row] for row in rows) - ids.shape[1],
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([ends]),
            )
            new = drawn[:, ids.shape[1] :]
            log_probs = torch.stack(draw.log_probs, dim=1).tolist()
            for row, tokens, values in zip(rows, new.tolist(), log_probs, strict=True):
                found[row][0].extend(tokens)
                found[row][1].extend(values)
            kept = [i for i, ended in enumerate(ends.ended.tolist()) if not ended]
            rows = [rows[i] for i in kept]
            ids, mask = drawn[kept], torch.cat([mask, torch.ones_like(new)], 1)[kept]
            if cache is not None and rows:
                keep_rows(cache, kept)
        return found

    def _read(self, prompts: list[Sequence[int]], ids: Tensor, mask: Tensor) -> DynamicCache | None:
        """A cache for the rows, of prompts that recur with all but their last token read once."""
        cache = roomy_cache(unwrap_peft(self.model))
        first = {tuple(prompt): row for row, prompt in reversed(list(enumerate(prompts)))}
        if cache is None or len(first) == len(prompts) or min(map(len, prompts)) < 2:
            return cache
        distinct = sorted(first.values())
        self._generate(ids[distinct, :-1], mask[distinct, :-1], cache, max_new_tokens=1)
        keep_rows(cache, [distinct.index(first[tuple(prompt)]) for prompt in prompts])
        return cache

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: DynamicCache | None,
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> Tensor:
        """``model.generate`` without any choice of its own, going on from what is in a cache."""
        if cache is not None:
            options["past_key_values"] = cache
        return self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=self.stop_token_ids or None,
                pad_token_id=0,  # any id: the mask and the first stop token say what is real
            ),
            synced_gpus=False,  # ZeRO-3's default waits for processes, which sample different rows
            **options,
        )


def _left_padded(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, int64 [prompts, longest]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class _Row:
    """One completion to draw, for the prompt of a number."""

    index: int
    prompt: Sequence[int]
    sample: int
    settings: SamplingSettings


def _kind(settings: SamplingSettings) -> tuple[float, float, int]:
    """What the rows of a batch must have in common."""
    return settings.temperature, settings.top_p, settings.top_k


class _Draw(LogitsProcessor):
    """Draws each row's next token and leaves it the only finite score, for ``generate`` to take.

    Attributes:
        log_probs: Per step, what ``Completion.log_prob`` sums up, float32 [rows].
        rows: The rows of the batch that are still drawn for.
    """

    def __init__(self, batch: Sequence[_Row], width: int, device: torch.device) -> None:
        settings = batch[0].settings
        self.width = width
        self.rows = list(range(len(batch)))
        self.log_probs: list[Tensor] = []
        self.greedy = settings.temperature == 0
        if self.greedy:
            return
        self.temperature = settings.temperature
        longest = max(row.settings.max_new_tokens for row in batch)
        keys = (sample_key(row.settings.seed, row.prompt, row.sample) for row in batch)
        noise = np.stack([uniforms(key, longest) for key in keys])
        self.noise = torch.from_numpy(noise).to(device)
        self.warpers = LogitsProcessorList()
        if settings.top_k > 0:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        if not scores.amax(-1).isfinite().all():
            raise PrefoptError(
                f"generation: the model's logits are not finite at generated token {step + 1}: "
                "its weights are damaged or overflow in half precision; load another checkpoint, "
                "or this one in float32"
            )
        if self.greedy:
            tokens = scores.argmax(-1)
        else:
            scores = scores / self.temperature
            probs = self.warpers(input_ids, scores).softmax(-1)
            tokens = draw_tokens(probs, self.noise[self.rows, step])
        chosen = scores.gather(-1, tokens[:, None])[:, 0]
        self.log_probs.append(chosen - scores.logsumexp(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


class _Ends(StoppingCriteria):
    """Ends a row with a stop token or at its limit, and all together once enough have ended.

    Args:
        ids: The rows as they begin.
        limits: How wide each may become.
        stop_token_ids: Tokens that end a row.
    """

    def __init__(self, ids: Tensor, limits: list[int], stop_token_ids: list[int]) -> None:
        self.limits = torch.tensor(limits, device=ids.device)
        self.stops = torch.tensor(stop_token_ids, dtype=torch.long, device=ids.device)
        self.ended = torch.zeros_like(self.limits, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.ended |= torch.isin(input_ids[:, -1], self.stops)
        self.ended |= input_ids.shape[1] >= self.limits
        return self.ended | (self.ended.float().mean() >= SHARE_ENDED)


def draw_tokens(probs: Tensor, noise: Tensor) -> Tensor:
    """The inverse of each row's cumulative distribution.

    Args:
        probs: Probabilities, float32 [rows, vocabulary]; a row's sum may be off 1 by rounding.
        noise: Uniform numbers in (0, 1), float32 [rows].

    Returns:
        Token ids, int64 [rows]; never one of probability 0.
    """
    # A parallel sum may still rise or fall by an ulp where a probability is 0, so those entries
    # leave the comparison. The threshold is below the largest entry, hence some token is above it.
    cumulative = probs.cumsum(-1).masked_fill(probs == 0, 0.0)
    threshold = noise[:, None] * cumulative.amax(-1, keepdim=True)
    return (cumulative > threshold).int().argmax(-1)


@contextmanager
def _ready_to_generate(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Evaluation mode and blank generation defaults, both put back as they were, module by module.

    ``generate`` fills every field left open in the configuration it is given from the model's own,
    so the model's own has to be blank as well.
    """
    modes = [(module, module.training) for module in model.modules()]
    defaults = [
        (module, module.generation_config)
        for module in model.modules()
        if "generation_config" in vars(module)
    ]
    try:
        model.eval()
        for module, _ in defaults:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, config in defaults:
            module.generation_config = config
