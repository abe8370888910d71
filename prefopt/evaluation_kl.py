"""How far an evaluated policy has moved from the one its run began with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from prefopt.data.tree import PromptTree
from prefopt.models.forward import enable_trees
from prefopt.trainers.base import TreeTrainer
from prefopt.trainers.reference import stored_log_probs

KL_PROMPTS = 256  # whose samples an estimate takes


def measures_kl(trainer: Trainer) -> bool:
    """Whether the start can be had beside the policy: not where whole weights are in shards."""
    if not isinstance(trainer, TreeTrainer):
        return False
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    return _under_adapter(trainer) is not None or not sharded


def kl_from_start(
    trainer: Any,
    trees: Sequence[PromptTree],
    folder: Path,
    load_start: Callable[[], PreTrainedModel],
) -> dict[str, float | None]:
    """An unbiased estimate of KL(policy || start) from samples of the policy: the mean log-ratio.

    All processes call this together.

    Args:
        trainer: The trainer, for which `measures_kl` is true.
        trees: Prompts, each with one sample of the policy at temperature 1, nothing cut off.
        folder: Where log-probs are kept.
        load_start: Loads the policy the run began with; not asked for one under an adapter.

    Returns:
        ``kl`` in nats an answer and ``kl_standard_error`` over prompts, None of a single one.
    """
    own = stored_log_probs(trainer, trees, folder / "policy", weights=nullcontext(), moved=False)
    with _start(trainer, load_start) as (model, weights):
        start = stored_log_probs(
            trainer, trees, folder / "start", weights=weights, moved=False, model=model
        )
    ratios = (torch.cat(own) - torch.cat(start)).double()
    error = ratios.std().item() / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    return {"kl": ratios.mean().item(), "kl_standard_error": error}


@contextmanager
def _start(
    trainer: TreeTrainer, load_start: Callable[[], PreTrainedModel]
) -> Iterator[tuple[PreTrainedModel | None, AbstractContextManager[Any]]]:
    """A model and a context in which it is the start: the trainer's without its adapter, if any."""
    adapted = _under_adapter(trainer)
    if adapted is not None:
        yield None, adapted.disable_adapter()
        return
    model = load_start().to(trainer.args.device)  # freed when the caller has done with it
    enable_trees(model)
    yield model, nullcontext()


def _under_adapter(trainer: TreeTrainer) -> PeftModel | None:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return model if isinstance(model, PeftModel) else None
