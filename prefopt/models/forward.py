"""Teaches a transformers model to run on prompt trees through its ordinary ``forward``.

The new argument ``trees`` travels through DDP, FSDP and PEFT wrappers as any keyword does, so hooks
and gathers run as always. Without it the model behaves exactly as before.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.data.tree import TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.attention import TREE_ATTENTION, TreeMap
from prefopt.models.logprobs import LogitTransform, token_log_probs


def unwrap_peft(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    base: Any = model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def enable_trees(model: nn.Module) -> None:
    """Adds the ``trees`` argument to the model's forward, in place; doing it twice is harmless.

    A causal LM answers ``model(trees=batch, temperature=T)`` with ``{"log_probs": [tokens]}``,
    float32, under softmax(logits / T); T is 1 by default. A sequence classifier with one label
    answers ``model(trees=batch)`` with ``{"scores": [completions]}``, float32, read at each
    completion's last token, and with ``values=True`` with ``{"values": [tokens]}``, float32, read
    where each completion token is predicted: the value of the state before that token.

    Args:
        model: A transformers model, PEFT-wrapped or not, before DDP or FSDP wrap it.

    Raises:
        PrefoptError: The model is neither a causal LM nor a one-label sequence classifier.
    """
    base = unwrap_peft(model)
    if getattr(base, "_prefopt_trees", False):
        return
    head = _head(base)
    if head is None:
        raise PrefoptError(
            f"{type(base).__name__} has neither a language-model head nor a one-label 'score' "
            "head; expected a causal LM or a sequence classifier with num_labels=1"
        )
    if supports_tree_attention(base):
        base.set_attn_implementation(TREE_ATTENTION)
    bound = base.forward
    # unbound where it can be, so that a deep copy of the model answers with its own weights
    original = bound.__func__ if inspect.ismethod(bound) else lambda _, *a, **kw: bound(*a, **kw)
    is_causal_lm = base.get_output_embeddings() is not None

    # the wrapped signature stays visible: generate() checks its arguments against it
    @functools.wraps(type(base).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        trees: TreeBatch | None = None,
        temperature: float = 1.0,
        values: bool = False,
        **kwargs: Any,
    ) -> Any:
        if trees is None:
            return original(self, *args, **kwargs)
        hidden = _hidden_states(self, trees)
        # the head is looked up on every call because FSDP and PEFT may replace it
        if is_causal_lm:
            log_probs = token_log_probs(
                hidden.index_select(0, trees.predict_from),
                trees.targets,
                self.get_output_embeddings(),
                logit_transform(self, temperature),
            )
            return {"log_probs": log_probs}
        head, read_at = self.score, trees.predict_from if values else trees.last
        with torch.autocast(hidden.device.type, enabled=False):  # differences of scores are small
            dtype = next(head.parameters()).dtype
            scores = head(hidden.index_select(0, read_at).to(dtype))[:, 0].float()
        return {"values" if values else "scores": scores}

    base.forward = types.MethodType(forward, base)
    base._prefopt_trees = True


def trunk(model: PreTrainedModel) -> PreTrainedModel:
    """The model under the head, which returns hidden states."""
    # the prefix of Llama 4's text model names no attribute, and base_model is the model itself
    return model.base_model if model.base_model is not model else model.model


def supports_tree_attention(model: nn.Module) -> bool:
    """Whether the model takes its attention function from transformers' AttentionInterface.

    A model without SDPA needs something of its attention that SDPA cannot do (such as the sinks of
    gpt-oss), and the tree attention would leave it out without a word.
    """
    base = unwrap_peft(model)
    return base._can_set_attn_implementation() and base._supports_sdpa


def logit_transform(model: PreTrainedModel, temperature: float = 1.0) -> LogitTransform:
    """Reads from the config what the model does to its logits after the head.

    Gemma 2 and 3 bound them, Cohere multiplies them (``logit_scale``), Granite divides them
    (``logits_scaling``). The layout check on a run's first batch catches models that do
    something else.
    """
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        scale = 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None), temperature)


def _head(model: PreTrainedModel) -> nn.Module | None:
    embeddings = model.get_output_embeddings()
    if embeddings is not None:
        return embeddings
    return getattr(model, "score", None) if model.config.num_labels == 1 else None


def _hidden_states(model: PreTrainedModel, trees: TreeBatch) -> Tensor:
    """Final hidden states of all positions, [rows * width, hidden]."""
    if trees.segments:
        if not supports_tree_attention(model):
            raise PrefoptError(
                f"layout 'tree': the attention of {type(model).__name__} is not that of "
                "transformers' AttentionInterface with SDPA; use layout 'separate' or 'auto'"
            )
        arguments: dict[str, Any] = {
            "position_ids": trees.position_ids,
            # a 4D mask is handed on as it is, so that no [width x width] mask is ever built
            "attention_mask": torch.ones(1, 1, 1, 1, device=trees.input_ids.device),
            "tree_map": TreeMap(trees),
        }
    else:
        arguments = {"attention_mask": trees.attention_mask}
    output = trunk(model)(input_ids=trees.input_ids, use_cache=False, **arguments)
    return output.last_hidden_state.flatten(0, 1)
