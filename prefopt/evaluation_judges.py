"""The judges of evaluations while training: who is asked, and by which process."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import Trainer

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.eval.win_rate import FloatArray
from prefopt.evaluation_alarm import NOT_WATCHED
from prefopt.judge import Judge
from prefopt.trainers.rounds import RoundTrainer

logger = logging.getLogger(__name__)

# a judge, and all that its answers depend on, for the records
LoadJudge = Callable[[Trainer], tuple[Judge, dict[str, Any]]]


def judge_to_watch(trainer: Trainer, judge: Judge, record: dict[str, Any]) -> Judge | None:
    """The judge that training asks, if there is one and it is not the evaluations' own.

    Args:
        trainer: The trainer.
        judge: The judge of evaluations.
        record: What its answers depend on.
    """
    if not (isinstance(trainer, RoundTrainer) and trainer.judge):
        return None
    weights = trainer.facts["judge's weights"]
    if judge is trainer.judge or (weights and weights == record.get("weights")):
        logger.warning(NOT_WATCHED, "eval.judge is the judge that training asks")
        return None
    return trainer.judge


def prefer(
    accelerator: Accelerator,
    judge: Judge,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    baseline: Sequence[str],
) -> FloatArray:
    """P(the policy's answer beats the baseline's), [prompts], the same on all processes.

    An API is asked by the main process, another judge by each process its share.

    Args:
        accelerator: The one that trains; all processes call this together.
        judge: The judge.
        record: What its answers depend on; it has ``kind``.
        prompts: What was answered.
        texts: The policy's answers, one a prompt.
        baseline: Those of the baseline.

    Returns:
        Probabilities; NaN where an API's judgement could not be read.

    Raises:
        PrefoptError: A judge that is no API says what is not finite.
    """
    own = share(accelerator, len(texts))
    if record["kind"] == "api":
        own = list(range(len(texts))) if accelerator.is_main_process else []
    a, b = ([side[index] for index in own] for side in (texts, baseline))
    values = np.asarray(
        judge.prefer([prompts[index] for index in own], a, b) if own else [], dtype=np.float64
    )
    if record["kind"] != "api" and not np.isfinite(values).all():
        raise PrefoptError(
            f"judge {record}: found a preference that is not finite, expected probabilities; "
            "look at the judge's weights"
        )
    found = sorted(gather_object(list(zip(own, values.tolist(), strict=True))))
    return np.array([value for _, value in found])


def share(accelerator: Accelerator, count: int) -> list[int]:
    """Which of so many things are this process's to do."""
    return list(range(accelerator.process_index, count, accelerator.num_processes))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Gives training its random generators back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def free_memory() -> None:
    """Gives back the memory of a judge that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
