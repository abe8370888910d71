"""Which engine samples for a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.template import stop_token_ids
from prefopt.recipe import Recipe
from prefopt.rollout.engine import Engine, SamplingSettings
from prefopt.rollout.vllm_engine import VLLMEngine
from prefopt.rollout.vllm_process import cannot_run, cannot_serve
from prefopt.rollout.vllm_requests import TEMPERATURES, check_temperatures
from prefopt.rollout.vllm_server import VLLMServerEngine

logger = logging.getLogger(__name__)


def make_engine(
    recipe: Recipe,
    args: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    sampling: Sequence[SamplingSettings],
) -> Engine | None:
    """The engine that a recipe asks for; None: transformers' on the trainer's own model.

    All processes call this, before training takes memory.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        model: The policy as it was loaded.
        tokenizer: Its tokenizer.
        longest_prompt: Tokens of the longest prompt.
        sampling: The settings they are sampled with.

    Raises:
        PrefoptError: vLLM cannot run here, or cannot run this model, or a server is not there.
    """
    rollout, name = recipe.rollout, recipe.rollout.engine
    if name == "auto":
        why_not = unfit(model, sampling)
        logger.info("rollout.engine: %s", f"transformers ({why_not})" if why_not else "vllm")
        name = "transformers" if why_not else "vllm"
    if name == "transformers":
        return None
    check_temperatures(sampling)
    common: dict[str, Any] = {
        "stop_token_ids": stop_token_ids(tokenizer, model.generation_config),
        "context_length": longest_prompt + max(part.max_new_tokens for part in sampling),
    }
    if name == "vllm":
        dtype = _precision(args, model)
        return VLLMEngine(
            model.config, tokenizer, dtype=dtype, gpu_memory=rollout.gpu_memory, **common
        )
    return VLLMServerEngine(
        rollout.servers or [],
        tokenizer,
        weights_dir=Path(recipe.run_dir) / "weights",
        transfer=rollout.transfer,
        **common,
    )


def unfit(model: PreTrainedModel, sampling: Sequence[SamplingSettings]) -> str | None:
    """Why vLLM in this process would not do for a policy; None if it would."""
    if why_not := cannot_run():
        return why_not
    least, most = TEMPERATURES
    for part in sampling:
        if part.temperature and not least <= part.temperature <= most:
            return f"vLLM does not sample at temperature {part.temperature}"
    if getattr(model, "quantization_method", None) is not None:
        return "quantised weights cannot be pushed to vLLM"
    problem = cannot_serve(model.config)
    return f"vLLM cannot serve this model: {problem}" if problem else None


def _precision(args: Any, model: PreTrainedModel) -> str:
    if args.bf16:
        return "bfloat16"
    return "float16" if args.fp16 else str(model.dtype).removeprefix("torch.")
