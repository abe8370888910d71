"""Samples the next round on servers while this one is trained on: one round stale.

Off-policy by exactly one round, as in asynchronous RLHF (Noukhovitch et al., arXiv 2410.18252),
whose finding is that online DPO bears it. Only sampling runs beside training: what is
sampled lies on disk before its round begins, and is judged and paired then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, cast

import torch

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import PushedEngine
from prefopt.rounds.collect import Collector, Drawing, first_drawing, sample, undone
from prefopt.rounds.sampling import Player
from prefopt.rounds.store import rollouts_path, round_folder
from prefopt.trainers.players import push

if TYPE_CHECKING:
    from prefopt.trainers.rounds import RoundTrainer


class Ahead:
    """The sampling of one round beside the training on the one before.

    Args:
        trainer: The trainer, whose engine samples on other devices than its own.

    Raises:
        PrefoptError: The engine samples on the trainer's own devices.
    """

    def __init__(self, trainer: RoundTrainer) -> None:
        if not getattr(trainer.engine, "elsewhere", False):
            raise PrefoptError(
                f"overlap: found {type(trainer.engine).__name__}, which samples on the devices "
                "that train; use rollout.engine vllm_server, or set overlap to false"
            )
        self.trainer = trainer
        self.running: Future[float] | None = None
        self.seconds: dict[str, float] = {}

    def begin(self, index: int) -> None:
        """Pushes the policy as it is now, and has a round sampled from it; all processes call this.

        Args:
            index: Number of the round.
        """
        trainer = self.trainer
        folder = round_folder(trainer.rounds_dir, index)
        drawing = first_drawing(trainer.collector, folder, index, trainer.plan[index])
        missing, own = undone(drawing, rollouts_path)
        if missing:
            push(trainer, cast(PushedEngine, trainer.engine))
            sampler = replace(trainer.collector.sampler, players=[Player(trainer.engine)])
            collector = replace(trainer.collector, sampler=sampler)
            self.running = Future()
            # a daemon: a run that fails ends at once, and what was sampled by then is on disk
            work = (self.running, collector, drawing, own)
            Thread(target=_run, args=work, name="sampling", daemon=True).start()

    def wait(self) -> dict[str, float]:
        """Waits until what was begun is on disk; all processes call this.

        Returns:
            Seconds of the round that was begun last: ``time/ahead``, that sampling took beside
            training, and ``time/saved``, the part of it that training did not wait for.

        Raises:
            BaseException: What sampling ended with, here or in another process.
        """
        begun, running, accelerator = time.perf_counter(), self.running, self.trainer.accelerator
        problem = running.exception() if running is not None else None
        waited = time.perf_counter() - begun
        # all processes end alike: what they do next, such as a checkpoint, they do together
        failed = torch.tensor([float(problem is not None)], device=accelerator.device)
        failures = accelerator.reduce(failed, "sum").item()
        self.running = None
        if problem is not None:
            raise problem
        if failures:
            raise PrefoptError("overlap: another process could not sample; its error says why")
        if running is not None:
            took = running.result()
            self.seconds = {"time/ahead": took, "time/saved": max(0.0, took - waited)}
        return self.seconds


def _run(
    running: Future[float], collector: Collector, drawing: Drawing, own: Sequence[int]
) -> None:
    """Samples some shards; the future has the seconds it took, or what it ended with."""
    begun = time.perf_counter()
    try:
        sample(collector, drawing, own, lambda done: None)
    except BaseException as error:  # noqa: BLE001 - the trainer raises it
        running.set_exception(error)
    else:
        running.set_result(time.perf_counter() - begun)
