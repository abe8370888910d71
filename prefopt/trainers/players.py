"""Brings the policy to what samples from it: live weights as they are, or a push that is checked.

An engine with weights of its own is sent them whole before every round, and is then asked for the
log-probs of a few prompts. A weight that was forgotten, or a model that vLLM computes otherwise,
shows there; without the look, training would go on with samples of another policy. The first push
is preceded by one of other weights altogether: a server may have been started with the policy's,
and one that it does not take over would be right at first, and later on stale by too little to see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.gathered import gathered_weights, whole_weights
from prefopt.models.layout_check import TOLERANCE
from prefopt.models.logprobs import token_log_probs_of
from prefopt.rollout.engine import Engine, PushedEngine
from prefopt.rounds.sampling import Player
from prefopt.rounds.weights import exchanged, trainable_weights

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
        with weights(), live_policy(trainer):
            yield

    @contextmanager
    def pushed() -> Iterator[None]:
        push(trainer, cast(PushedEngine, engine), weights)
        try:
            yield
        finally:
            cast(PushedEngine, engine).release()

    return Player(engine, pushed if hasattr(engine, "push") else live)


@contextmanager
def live_policy(trainer: Trainer) -> Iterator[None]:
    """The policy that trains, ready to sample from; all processes enter and leave together."""
    # autocast, because a PEFT model's generate passes the trainer's wrapper by
    with whole_weights(trainer.model_wrapped), trainer.accelerator.autocast():
        yield


def push(trainer: RoundTrainer, engine: PushedEngine, weights: Weights = nullcontext) -> None:
    """Sends the policy's weights to an engine and makes sure that it computes what training does.

    Logs ``push/gap``, the mean difference of log-probs in nats a token, and ``time/push``, seconds.

    Raises:
        PrefoptError: The gap is above what rounding explains.
    """
    begun = time.perf_counter()
    with weights():
        if not trainer.pushed:
            _check_that_all_are_taken(trainer, engine)
            trainer.pushed = True
        engine.push(gathered_weights(trainer.model_wrapped))
        gap = _gap(trainer, engine, _log_probs(trainer))
    tolerance = _tolerance(trainer)
    if not gap <= tolerance:
        raise _another_policy(trainer, engine, gap, tolerance)
    seconds = time.perf_counter() - begun
    trainer.add_metrics({"push/gap": torch.tensor([gap]), "time/push": torch.tensor([seconds])})


def _check_that_all_are_taken(trainer: RoundTrainer, engine: PushedEngine) -> None:
    """Pushes weights that are far from the policy's; one that is left out changes everything.

    Raises:
        PrefoptError: One was.
    """
    own = _log_probs(trainer)
    # the sign of all, in any precision, and something of what is 0 at first, as half an adapter is
    others = {n: w.neg_().add_(1e-3) for n, w in trainable_weights(trainer.policy).items()}
    with exchanged(trainer.policy, others):
        engine.push(gathered_weights(trainer.model_wrapped))
        moved = _log_probs(trainer)
        gap = _gap(trainer, engine, moved)
    # such a model is rounded as coarsely as it is far from the policy
    tolerance = max(_tolerance(trainer), (moved - own).abs().mean().item() / 10)
    if not gap <= tolerance:
        raise _another_policy(trainer, engine, gap, tolerance)


def _another_policy(
    trainer: RoundTrainer, engine: PushedEngine, gap: float, tolerance: float
) -> PrefoptError:
    return PrefoptError(
        f"after a push of weights, log-probs of {type(engine).__name__} and of the trainer differ "
        f"by {gap:.3g} nats a token (at most {tolerance:.3g} expected in {trainer.compute_dtype}): "
        "it samples from another policy than is trained; use rollout.engine transformers for this "
        "model"
    )


def _tolerance(trainer: RoundTrainer) -> float:
    return TOLERANCE.get(trainer.compute_dtype, TOLERANCE[torch.bfloat16])


def _log_probs(trainer: RoundTrainer) -> Tensor:
    """The trainer's log-probs of the probes' tokens, [tokens]."""
    trees = [PromptTree(ids[:1], [ids[1:]]) for ids in _probes(trainer)]
    batch = collate_trees(trees, layout="separate").to(trainer.accelerator.device)
    trainer.model_wrapped.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        return token_log_probs_of(trainer.model_wrapped, batch)


def _gap(trainer: RoundTrainer, engine: PushedEngine, own: Tensor) -> float:
    """The mean absolute difference to the engine's log-probs, wherever it is largest."""
    said = [[p for each in held for p in each] for held in engine.log_probs(_probes(trainer))]
    gap = (own - torch.tensor(said, device=own.device)).abs().mean(1)
    gap = torch.where(gap.isfinite().all(), gap.max(), torch.inf)
    return trainer.accelerator.gather(gap[None]).max().item()


def _probes(trainer: RoundTrainer) -> list[list[int]]:
    """The first prompts; log-probs are those of all tokens but the first."""
    ids = trainer.prompts.prompt_ids
    first = [list(ids[row][:PROBE_TOKENS]) for row in range(min(PROBES, len(ids)))]
    return [ids if len(ids) > 1 else ids * 2 for ids in first]
