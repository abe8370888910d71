"""The critic of PPO: a model with one number, the value, at every state of a completion."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefopt.data.tree import TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.forward import trunk, unwrap_peft


def make_critic(policy: nn.Module, judge_model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A new critic, which shares no weights with what it is made from.

    Args:
        policy: The policy, a causal LM, PEFT-wrapped or not.
        judge_model: A one-label sequence classifier that reads the policy's tokens (see
            :func:`reads_same_tokens`), for the critic to begin as a copy of it, score head
            included. When None, the critic is the policy's trunk, an adapter merged into it, under
            a score head of zeros: all its values are exactly 0 at first.

    Returns:
        A one-label sequence classifier in float32 and evaluation mode, on the device of what it is
        made from, all of whose weights are trainable.

    Raises:
        PrefoptError: There is no judge's model, and the policy is quantised or transformers has no
            sequence classifier with a score head for its architecture.
    """
    critic = _headed_trunk(policy) if judge_model is None else copy.deepcopy(judge_model)
    return critic.float().requires_grad_(True).eval()


def _headed_trunk(policy: nn.Module) -> PreTrainedModel:
    """The policy's trunk, in float32, under a score head of zeros."""
    base = unwrap_peft(policy)
    if getattr(base, "is_quantized", False):
        raise PrefoptError(
            "model.quantization: a critic cannot be made from a quantised policy; use a reward "
            "model with the policy's tokenizer as the judge, from which the critic is then made, "
            "or quantization: null"
        )
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    try:
        with base.device:
            critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise _no_critic(base) from error
    if not hasattr(critic, "score"):
        raise _no_critic(base)
    if base is not policy:
        merged: Any = copy.deepcopy(policy).float()
        base = merged.merge_and_unload()
    trunk(critic).load_state_dict(trunk(base).state_dict())
    for parameter in critic.score.parameters():
        nn.init.zeros_(parameter)
    return critic


def _no_critic(policy: PreTrainedModel) -> PrefoptError:
    return PrefoptError(
        f"{type(policy).__name__} cannot be given a value head: transformers has no sequence "
        "classifier with a 'score' head for this architecture; use a reward model with the "
        "policy's tokenizer as the judge, from which the critic is then made, or another policy"
    )


def token_values(model: nn.Module, batch: TreeBatch) -> Tensor:
    """The value of the state before each completion token.

    Args:
        model: A critic after :func:`prefopt.models.forward.enable_trees`, wrapped or not.
        batch: The trees.

    Returns:
        float32 values, [tokens].
    """
    values: Tensor = model(trees=batch, values=True)["values"]
    return values


def reads_same_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether ``other`` gives every token of ``tokenizer`` the same id; it may have more tokens."""
    return tokenizer.get_vocab().items() <= other.get_vocab().items()
