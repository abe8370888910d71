"""Brings the policy to what samples from it: live weights as they are, or a push that is checked.

An engine with weights of its own is sent them whole before every round, and is then asked for the
log-probs of a few prompts. A weight that was forgotten, or a model that vLLM computes otherwise,
shows there; without the look, training would go on with samples of another policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.gathered import gathered_weights, whole_weights
from prefopt.models.layout_check import TOLERANCE
from prefopt.models.logprobs import token_log_probs_of
from prefopt.rollout.engine import Engine, PushedEngine
from prefopt.rounds.sampling import Player

if TYPE_CHECKING:
    from prefopt.trainers.rounds import RoundTrainer

PROBES = 4  # prompts whose log-probs are compared after a push
PROBE_TOKENS = 512

Weights = Callable[[], AbstractContextManager[Any]]


def player(trainer: RoundTrainer, engine: Engine, weights: Weights = nullcontext) -> Player:
    """A policy that samples: the trainer's, with the weights that a context gives it.

    Args:
        trainer: The trainer, whose policy it is.
        engine: What samples.
        weights: Makes a context in which the policy has the weights to sample from.
    """

    @contextmanager
    def live() -> Iterator[None]:
        # autocast, because a PEFT model's generate passes the trainer's wrapper by
        with weights(), whole_weights(trainer.model_wrapped), trainer.accelerator.autocast():
            yield

    @contextmanager
    def pushed() -> Iterator[None]:
        push(trainer, cast(PushedEngine, engine), weights)
        try:
            yield
        finally:
            cast(PushedEngine, engine).release()

    return Player(engine, pushed if hasattr(engine, "push") else live)


def push(trainer: RoundTrainer, engine: PushedEngine, weights: Weights = nullcontext) -> None:
    """Sends the policy's weights to an engine and makes sure that it computes what training does.

    Logs ``push/gap``, the mean difference of log-probs in nats a token, and ``time/push``, seconds.

    Raises:
        PrefoptError: The gap is above what rounding explains.
    """
    begun = time.perf_counter()
    with weights():
        engine.push(gathered_weights(trainer.model_wrapped))
        gap = _gap(trainer, engine)
    tolerance = TOLERANCE.get(trainer.compute_dtype, TOLERANCE[torch.bfloat16])
    if not gap <= tolerance:
        raise PrefoptError(
            f"after a push of weights, log-probs of {type(engine).__name__} and of the trainer "
            f"differ by {gap:.3g} nats a token (at most {tolerance:g} expected in "
            f"{trainer.compute_dtype}): it samples from another policy than is trained; use "
            "rollout.engine transformers for this model"
        )
    seconds = time.perf_counter() - begun
    trainer.add_metrics({"push/gap": torch.tensor([gap]), "time/push": torch.tensor([seconds])})


def _gap(trainer: RoundTrainer, engine: PushedEngine) -> float:
    """The mean absolute difference of log-probs on some prompts, of the process that has most."""
    device = trainer.accelerator.device
    probes = [ids[:PROBE_TOKENS] if len(ids) > 1 else [*ids, *ids] for ids in _prompts(trainer)]
    trees = [PromptTree(ids[:1], [ids[1:]]) for ids in probes]
    batch = collate_trees(trees, layout="separate").to(device)
    trainer.model_wrapped.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        own = token_log_probs_of(trainer.model_wrapped, batch)
    said = torch.tensor([p for each in engine.log_probs(probes) for p in each], device=device)
    gap = (own - said).abs().mean()
    return trainer.accelerator.gather(gap[None]).max().item()


def _prompts(trainer: RoundTrainer) -> list[list[int]]:
    ids = trainer.prompts.prompt_ids
    return [list(ids[row]) for row in range(min(PROBES, len(ids)))]
