"""Training that ends before its time, with nothing lost: by SIGTERM, or because a guard says so."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainerControl

from prefopt.preemption import Preempted, leave_if_asked
from prefopt.trainers.checkpoints import step_of

logger = logging.getLogger(__name__)

LATE = "the last step was taken by then: the run ends as it would have"


class Watcher(Protocol):
    """Looks at the samples of each round, and hears of what other guards find."""

    def after_sampling(self, report: Mapping[str, Any], begins: bool) -> None:
        """Runs when a round is on disk; to end training before it, it calls ``end_early``.

        Args:
            report: The round's ``round.json``.
            begins: False for a round that an earlier process has begun to train on.
        """
        ...

    def found(self, guard: str, value: float, bound: float | None, message: str) -> None:
        """Does what is to be done where another guard has found something.

        Args:
            guard: Its name.
            value: What was seen.
            bound: What was expected at most, or at least.
            message: What was seen, where, and what to try.
        """
        ...

    def write_down(self, guard: str, message: str) -> None:
        """Keeps what another guard ends training with at once.

        Args:
            guard: Its name.
            message: What was seen, where, and what to try.
        """
        ...


class EndsEarly(Trainer):
    """A Trainer that can be asked to end early, by ``end_early`` or by SIGTERM.

    It does so at safe points only, which lie between two steps: there the model is exactly that of
    ``state.global_step``, and it is saved before the error is raised.
    """

    control: TrainerControl
    watcher: Watcher | None = None
    over = False  # whether the last step was taken
    ending: Exception | None = None  # what the next safe point raises
    between_steps = False  # whether model or optimiser have moved on since ``state.global_step``

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_callback(_TrainingEnds(self))

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint that was written to its end."""
        raise NotImplementedError

    def end_early(self, error: Exception) -> None:
        """Has training end with an error at the next safe point, once the model is saved.

        Callbacks may call it at any time, on all processes alike; the first error counts. Where the
        last step has been taken, training ends as it would have.
        """
        if self.over:
            logger.warning(LATE)
        elif self.ending is None:
            self.ending = error

    def safe_point(self) -> None:
        """Ends training if that was asked for; all processes call this, between two steps.

        Raises:
            Exception: What ``end_early`` was called with.
            Preempted: SIGTERM came, to whichever process.
        """
        if self.ending is not None:
            raise self.ending
        leave_if_asked()

    @contextmanager
    def saved_on_early_end(self) -> Iterator[None]:
        """Saves the model, if it is that of the step, when the block ends training early."""
        try:
            yield
        except Preempted as error:
            raise Preempted(self._save_now()) from error
        except Exception as error:
            if error is self.ending:
                self._save_now()
            raise

    def _save_now(self) -> str:
        """Writes a checkpoint of this step if there is none; says which one there is."""
        step, newest = self.state.global_step, self.newest_checkpoint()
        there = newest is not None and step_of(newest) == step
        # as the main process sees it: others may have looked before it marked the last one complete
        flag = torch.tensor([int(there)], device=self.accelerator.device)
        there = bool(self.accelerator.gather(flag)[0].item())
        if step > 0 and not there and not self.between_steps:
            self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.accelerator.wait_for_everyone()  # the first to end has the launcher end the others
        newest = self.newest_checkpoint()
        if newest is None:
            return "no step is saved, but all that was made before the first one is on disk"
        if step_of(newest) == step:
            return f"saved at step {step} as {newest}"
        return f"at step {step}; the last one saved is {newest}"


class _TrainingEnds(TrainerCallback):
    def __init__(self, trainer: EndsEarly) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.over = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.over = True
        if self.trainer.ending is not None:
            logger.warning(LATE)
            self.trainer.ending = None
