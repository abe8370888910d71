"""Log-probs of completions: the head on completion tokens only, in chunks, in float32.

At no time is there a [tokens x vocabulary] tensor for a whole batch: a chunk of logits is made,
reduced to one number a token, and made again in the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prefopt.data.tree import TreeBatch

# Elements of one chunk of logits. Each chunk passes over the head's weights and their gradient
# once, so it should hold some 50 tokens of the largest vocabularies (2**23 float32 logits take
# 32 MiB); on a GPU it should also be large enough to fill the device (2**26 take 256 MiB).
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


@dataclass(frozen=True)
class LogitTransform:
    """What becomes of logits: ``softcap * tanh(scale * logits / softcap) / temperature``.

    Scale and cap belong to the model, the temperature to the distribution that is asked for.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Applies the transform to raw logits of any shape."""
        logits = logits * self.scale if self.scale != 1.0 else logits
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature if self.temperature != 1.0 else logits

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """d transformed / d raw logits, from the transformed logits."""
        slope = self.scale / self.temperature
        if self.softcap is None:
            return slope
        return slope * (1 - (transformed * self.temperature / self.softcap) ** 2)


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(transform(hidden @ weight.T + bias))[target], a chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> Tensor:
        log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(log_probs)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = transform(nn.functional.linear(hidden[part], weight, bias).float())
            normalisers[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(-1, targets[part, None])[:, 0] - normalisers[part]
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.transform, ctx.chunk = transform, chunk
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # the sum over chunks is taken in float32 also for bfloat16 weights
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = ctx.transform(nn.functional.linear(hidden[part], weight, bias).float())
            slope = ctx.transform.derivative(logits)
            logits.sub_(normalisers[part, None]).exp_().mul_(-grad[part, None])
            logits.scatter_add_(-1, targets[part, None], grad[part, None].float())
            if not isinstance(slope, float) or slope != 1.0:
                logits.mul_(slope)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            logits = logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = logits @ weight
            if grad_weight is not None:
                if weight.dtype == torch.float32:
                    grad_weight.addmm_(logits.T, hidden[part])
                else:
                    grad_weight += logits.T @ hidden[part]
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
            None,
            None,
            None,
        )


def token_log_probs(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module,
    transform: LogitTransform,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Log-prob of each target token under the head, in float32.

    Args:
        hidden: Hidden states that predict the targets, [tokens, hidden].
        targets: Token ids, [tokens].
        head: The language-model head. One that computes what ``nn.Linear`` does takes the fused
            path; any other (LoRA on it, a quantised one) is called chunk by chunk, checkpointed.
        transform: What the model does to its logits.
        chunk: Tokens a chunk; chosen from the vocabulary and the device when None.

    Returns:
        Log-probs, [tokens].
    """
    chunk = chunk or _chunk_size(getattr(head, "out_features", 2**17), hidden.device)
    own_forward = getattr(head.forward, "__func__", None)
    if isinstance(head, nn.Linear) and own_forward is nn.Linear.forward:
        # FSDP and ZeRO gather a weight in hooks around the forward of the module that holds it
        fused = functools.partial(_fused, head, targets, transform, chunk)
        head.forward = fused  # type: ignore[method-assign]
        try:
            return head(hidden)
        finally:
            del head.forward

    def score(part: Tensor, part_targets: Tensor) -> Tensor:
        logits = transform(head(part).float())
        return logits.log_softmax(-1).gather(-1, part_targets[:, None])[:, 0]

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([_checkpointed(score, h, t) for h, t in parts])


def _fused(
    head: nn.Linear, targets: Tensor, transform: LogitTransform, chunk: int, hidden: Tensor
) -> Tensor:
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _ChunkedLogProbs.apply(hidden.to(weight.dtype), weight, bias, targets, transform, chunk)


def _checkpointed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False)


def _chunk_size(vocabulary: int, device: torch.device) -> int:
    return max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // vocabulary)


def token_log_probs_of(model: nn.Module, batch: TreeBatch, temperature: float = 1.0) -> Tensor:
    """Log-prob of every completion token, the produced EOS included.

    Args:
        model: A causal LM after :func:`prefopt.models.forward.enable_trees`, wrapped or not.
        batch: The trees.
        temperature: Divisor of the logits, above 0; no top-k and no top-p.

    Returns:
        float32 log-probs in nats, [tokens].
    """
    options = {} if temperature == 1.0 else {"temperature": temperature}
    log_probs: Tensor = model(trees=batch, **options)["log_probs"]
    return log_probs.float()


def sequence_log_probs(model: nn.Module, batch: TreeBatch, temperature: float = 1.0) -> Tensor:
    """Sums of :func:`token_log_probs_of` per completion.

    Args:
        model: A causal LM after :func:`prefopt.models.forward.enable_trees`, wrapped or not.
        batch: The trees.
        temperature: Divisor of the logits, above 0.

    Returns:
        float32 sums in nats, [completions].
    """
    return batch.sum_per_completion(token_log_probs_of(model, batch, temperature))


def next_token_log_probs(model: nn.Module, batch: TreeBatch, candidates: Sequence[int]) -> Tensor:
    """Log-probs of some tokens as the one that follows each completion.

    Args:
        model: A causal LM after :func:`prefopt.models.forward.enable_trees`, wrapped or not.
        batch: The trees.
        candidates: Token ids.

    Returns:
        float32 log-probs in nats, [completions, candidates].
    """
    count = len(candidates)
    targets = torch.tensor([*candidates], device=batch.last.device)
    asked = replace(
        batch,
        predict_from=batch.last.repeat_interleave(count),
        targets=targets.repeat(batch.num_completions),
    )
    return token_log_probs_of(model, asked).view(-1, count)
