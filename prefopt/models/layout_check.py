"""Checks on real rows that a model's tree log-probs are those of its ordinary forward pass."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prefopt.data.tree import Layout, PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.critic import token_values

logger = logging.getLogger(__name__)

# Largest mean difference in nats a token that rounding explains, by the type of the weights.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def layout_for(model: nn.Module, trees: Sequence[PromptTree], dtype: torch.dtype) -> Layout:
    """The fastest layout whose numbers agree with the model's own forward pass.

    Args:
        model: A model after ``enable_trees``, wrapped or not, in eval mode. All ranks must call
            this with the same trees where the model is sharded.
        trees: Some real trees; the longest is used, since a sliding window that the attention
            function is not told of shows on long rows only.
        dtype: The precision the model computes in, which sets the tolerance.

    Returns:
        ``tree``, or ``separate`` (with a warning) where trees give other numbers.

    Raises:
        PrefoptError: Not even separate rows agree, so no log-prob could be trusted.
    """
    tree = max(trees, key=lambda t: t.num_tokens)
    device = next(model.parameters()).device
    gaps: dict[Layout, float] = {}
    layouts: tuple[Layout, ...] = ("tree", "separate")
    for layout in layouts:
        batch = collate_trees([tree], layout=layout).to(device)
        with torch.no_grad():
            ((kind, found),) = model(trees=batch).items()
            expected = _plain(model, tree, device, per_token=kind == "log_probs")
        gaps[layout] = (found.float() - expected).abs().mean().item()
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if gaps["separate"] > tolerance:
        raise PrefoptError(
            f"{type(model).__name__}: log-probs read from hidden states differ from the model's "
            f"own logits by {gaps['separate']:.3g} nats a token (at most {tolerance:g} expected): "
            "this model does something to its logits that prefopt does not know"
        )
    if gaps["tree"] > tolerance:
        logger.warning(
            "log-probs on prompt trees differ from separate rows by %.3g nats a token (at most %g "
            "expected): falling back to one completion a row (layout=separate)",
            gaps["tree"],
            tolerance,
        )
        return "separate"
    return "tree"


def values_agree(critic: nn.Module, trees: Sequence[PromptTree], dtype: torch.dtype) -> bool:
    """Whether a critic reads the same values off a tree as off separate rows.

    Args:
        critic: A critic after ``enable_trees``, wrapped or not, in eval mode.
        trees: Some real trees; the longest is used.
        dtype: The precision the critic computes in, which sets the tolerance.
    """
    tree = max(trees, key=lambda t: t.num_tokens)
    device = next(critic.parameters()).device
    with torch.no_grad():
        on_tree, apart = (
            token_values(critic, collate_trees([tree], layout=layout).to(device))
            for layout in ("tree", "separate")
        )
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    return bool((on_tree - apart).abs().mean() <= tolerance * max(1.0, apart.abs().mean().item()))


def _plain(model: nn.Module, tree: PromptTree, device: torch.device, per_token: bool) -> Tensor:
    """Token log-probs (or scores) of a tree by plain forwards, one completion at a time."""
    values = []
    for completion in tree.completions:
        ids = torch.tensor([[*tree.prompt, *completion]], device=device)
        logits = model(input_ids=ids, use_cache=False).logits[0]
        if per_token:
            targets = ids[0, len(tree.prompt) :, None]
            log_probs = logits[len(tree.prompt) - 1 : -1].float().log_softmax(-1)
            values.append(log_probs.gather(-1, targets)[:, 0])
        else:
            values.append(logits.float())
    return torch.cat(values)
