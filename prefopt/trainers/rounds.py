"""Training in rounds: sample from the policy, have the samples judged, optimise, begin again.

One call of ``train`` runs all rounds on one model, one optimiser and one series of checkpoints.
transformers' loop asks for the micro-batches of one optimiser step at a time; a round is collected
when a step is asked for that the rounds before it do not hold, so that nothing is ever sampled from
a policy older than the last step.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainerCallback

from prefopt.data.tokenize import TokenizedPrompts
from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.rollout.engine import Engine, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.collect import Ask, Collector
from prefopt.rounds.mending import (
    REPORT,
    SAMPLES,
    check_made_again,
    clear_damaged,
    clear_damaged_results,
)
from prefopt.rounds.plan import row_order
from prefopt.rounds.processes import from_main
from prefopt.rounds.sampling import Sampler
from prefopt.rounds.start import open_facts
from prefopt.rounds.storage import remove_partial
from prefopt.rounds.store import read_lines, round_folder
from prefopt.rounds.sums import DamagedError
from prefopt.rounds.weights import damage_of_weights, save_weights, trainable_weights
from prefopt.trainers.ahead import Ahead
from prefopt.trainers.base import TreeDataset, TreeTrainer
from prefopt.trainers.checkpoints import way_back
from prefopt.trainers.players import player
from prefopt.trainers.reference import progress_bar, shared_fingerprint
from prefopt.trainers.round_config import RoundConfig, adapter_facts, schedule, settings_of
from prefopt.trainers.round_rows import rows_of
from prefopt.trainers.sharding import check_rounds

logger = logging.getLogger(__name__)

SHOWN_PROMPTS = 64  # a bar for fewer would be gone before it is read


@dataclass(frozen=True)
class OpenRound:
    """The round that is being trained on.

    Attributes:
        index: Its number, from 0.
        start: Optimiser steps before it.
        steps: Optimiser steps in it.
        order: Row numbers of all its passes, one after another.
    """

    index: int
    start: int
    steps: int
    order: np.ndarray

    @property
    def end(self) -> int:
        """The step it ends with."""
        return self.start + self.steps


class RoundTrainer(TreeTrainer):
    """Base of the trainers that sample.

    A subclass says what a round brings to disk (``ask``, ``is_collected``, ``collect``) and what is
    trained on (``rows_of_round``, ``round_dataset``).

    Args:
        model: The policy; as it is handed in, it is the ``initial`` policy.
        args: The algorithm's configuration.
        train_dataset: Rows as the algorithm needs them (docs/data.md), or tokenised ones.
        judge: What judges the samples.
        sampling: How a prompt is sampled: several settings share its samples out, one after
            another (their ``seed`` and ``first_sample`` are set by the rounds).
        engine: What samples; by default transformers' ``generate`` on the live model. One with
            weights of its own, such as vLLM's, is sent the policy's before every round.
        processing_class: The policy's tokenizer.
        **kwargs: As for :class:`prefopt.trainers.base.TreeTrainer`.

    Raises:
        PrefoptError: Something is missing, or settings do not go together.
    """

    config: type[RoundConfig] = RoundConfig

    def __init__(
        self,
        model: nn.Module,
        args: RoundConfig,
        train_dataset: TokenizedPrompts | Iterable[dict[str, Any]] | None,
        judge: Judge | None = None,
        sampling: SamplingSettings | Sequence[SamplingSettings] | None = None,
        engine: Engine | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is None or processing_class is None:
            raise PrefoptError(f"{type(self).__name__} needs train_dataset and processing_class")
        if not isinstance(args, self.config):
            raise PrefoptError(
                f"args: found {type(args).__name__}, but {type(self).__name__} needs "
                f"{self.config.__name__}"
            )
        if args.eval_strategy != "no" or kwargs.get("eval_dataset") is not None:
            raise PrefoptError(
                f"{type(self).__name__}: found eval_strategy or eval_dataset, but an algorithm "
                "that samples has no held-out loss; compare samples instead (prefopt eval)"
            )
        check_judge(type(self).__name__, args.asks, judge)
        self.judge = judge if args.asks else None
        parts = [sampling] if isinstance(sampling, SamplingSettings) else sampling
        self.sampling = list(parts or [SamplingSettings(samples_per_prompt=2)])
        self.samples_per_prompt = sum(part.samples_per_prompt for part in self.sampling)
        args = copy.copy(args)  # max_steps is this run's, not the caller's
        schedule(args, 1)  # refuses a schedule that needs more than the step
        args.check_sampling(self.sampling)
        longest = max(part.max_new_tokens for part in self.sampling)
        self.prompts = rows_of(args, train_dataset, processing_class, longest)
        self.plan = args.plan(len(self.prompts))
        self.args = args  # transformers sets it too, but only after its number of steps is asked
        prompts = [len(planned.prompts) for planned in self.plan]
        rows = args.rows_planned(prompts, self.samples_per_prompt)
        self.planned_steps = [self._steps(count) for count in rows]
        planned = sum(self.planned_steps)
        args.max_steps = min(planned, args.max_steps) if args.max_steps > 0 else planned
        self.fingerprint = shared_fingerprint(model)  # before an adapter or a checkpoint
        super().__init__(model, args, self.prompts, processing_class=processing_class, **kwargs)
        self.check_sharding()
        self.rounds_dir = Path(args.rounds_dir or Path(args.output_dir) / "rounds")
        engine = engine or TransformersEngine(
            self.model, processing_class, batch_size=args.generation_batch_size
        )
        self.engine = engine
        self.pushed = False  # whether the engine was ever sent weights
        self.collector = self.make_collector()
        self.ahead = Ahead(self) if args.overlap else None
        self.current: OpenRound | None = None
        self.begun = False
        self.facts = self._facts(kwargs.get("peft_config"))
        self.add_callback(_AfterSteps(self))

    def check_sharding(self) -> None:
        """Checks that rounds can work with the way the weights are sharded, if they are.

        Raises:
            PrefoptError: They cannot.
        """
        check_rounds(self, self.judge)

    # --- what an algorithm says ------------------------------------------------------------------

    def ask(self) -> Ask | None:
        """What the judge is asked about the samples of a round; None: nothing."""
        raise NotImplementedError

    def make_collector(self) -> Collector:
        """What every round is collected with."""
        return Collector(
            sampler=self.make_sampler(),
            ask=self.ask(),
            prompts_per_shard=self.args.prompts_per_shard,
            seed=self.args.seed,
        )

    def make_sampler(self) -> Sampler:
        """What every round is sampled with."""
        return Sampler(self.prompts, [player(self, self.engine)], self.sampling)

    def is_collected(self, folder: Path) -> bool:
        """Whether a round is on disk to its end."""
        raise NotImplementedError

    def collect(self, index: int, folder: Path) -> dict[str, float]:
        """Brings a round to disk, going on from what is there; returns the seconds it took."""
        raise NotImplementedError

    def rows_of_round(self, index: int) -> int:
        """The rows that a collected round trains on."""
        raise NotImplementedError

    def round_dataset(self, index: int, moved: bool) -> TreeDataset:
        """The rows of a collected round with their columns.

        Args:
            index: Number of the round.
            moved: Whether the weights have moved since the round began, as in a resumed run.
        """
        raise NotImplementedError

    def before_sampling(self, index: int) -> None:
        """Runs as a round begins, before anything is sampled.

        One that changes the model sets ``between_steps``: it is not that of the last step any more.
        """

    def begin_training(self, index: int) -> dict[str, float]:
        """Runs as a round begins, once it is collected; returns what is logged of it."""
        return {}

    def after_step(self) -> None:
        """Runs after every optimiser step, before a checkpoint is written."""

    def announce(self, opened: OpenRound, facts: dict[str, Any]) -> None:
        """Says what a round begins with."""
        self.log(facts)

    def batch_columns(self, rows: np.ndarray) -> dict[str, Any]:
        """Values that all micro-batches of a global batch share."""
        return {}

    reads_again = SAMPLES  # what of a round that is collected its data set is made of

    def window(self, index: int) -> range:
        """The rounds whose rows a round trains on."""
        return range(index, index + 1)

    @property
    def uses_initial_weights(self) -> bool:
        """Whether a later round needs the weights the run began with."""
        raise NotImplementedError

    # --- the loop --------------------------------------------------------------------------------

    def before_training(self, resumed: bool) -> None:
        """Checks that the rounds on disk are this run's, and keeps the initial weights."""
        if self.begun and not resumed:
            raise PrefoptError(
                f"{type(self).__name__}: train() was called before, and rounds begin with the "
                "policy that was handed in; make a new trainer"
            )
        self.begun = True
        self.current, self.layout_chosen = None, False
        self.reports_of: list[dict[str, Any]] = []  # of each round so far
        self.starts: list[int] = []  # the first step of each round so far
        from_main(lambda: remove_partial(self.rounds_dir))
        path = self.rounds_dir / "start.json"
        there = from_main(path.exists)
        from_main(lambda: open_facts(path, self.facts, "rounds"))
        if self.uses_initial_weights:
            kept = from_main(lambda: self._has_initial_weights(resumed))
            if not kept or not (there or resumed):  # the policy of a resumed run has moved
                save_weights(self.policy, trainable_weights(self.policy), self.initial_weights)

    def _has_initial_weights(self, resumed: bool) -> bool:
        """Whether the initial weights are on disk; a run that was resumed cannot do without."""
        damage = damage_of_weights(self.initial_weights)
        if damage is not None and resumed:
            raise PrefoptError(
                f"{damage}; the weights this run began with are gone: restore the file, or delete "
                "the run folder to begin again"
            )
        return damage is None

    def get_train_dataloader(self) -> DataLoader:
        """Counts micro-batches; what is in them is decided when a step begins."""
        micro_batches = self.args.max_steps * self.args.gradient_accumulation_steps
        # its own generator: an iterator that drew from the global one would move dropout's noise
        counted = TensorDataset(torch.arange(micro_batches))
        return DataLoader(counted, batch_size=1, generator=torch.Generator())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The micro-batches of the next step; collects a round first where one begins."""
        with self.saved_on_early_end():
            self.between_steps = False
            self.safe_point()
            if not self._open_rounds():
                return [], None
        assert self.current is not None
        here = (self.state.global_step - self.current.start) * self.args.global_batch
        rows = self.current.order[here : here + self.args.global_batch]
        return self._micro_batches(rows), torch.tensor(len(rows), device=device)

    def _open_rounds(self) -> bool:
        """Makes the round ready that the next step is of; whether there is one."""
        step = self.state.global_step
        while self.current is None or step >= self.current.end:
            last = self.current
            if last is not None and step == last.end:
                if self.ends_after(last.index + 1):
                    return False
                self.safe_point()  # an evaluation may have taken long, or have set off a guard
            index, start = (0, 0) if last is None else (last.index + 1, last.end)
            if index == len(self.plan):  # the last rounds gave no pairs
                self.control.should_training_stop = True
                if step == 0:
                    logger.warning("no round gave a pair to train on: the policy is as it was")
                return False
            begun = time.perf_counter()
            self.current = self._open(index, start)
            self._set_learning_rate()
            self._clock += time.perf_counter() - begun  # tokens a second are those of training
        return True

    def _micro_batches(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """This process's share of a global batch, as many micro-batches as every other has.

        Where there are too few rows, a row that does not count keeps the others company.
        """
        args, dataset = self.args, self.dataset
        own = np.array_split(rows, args.world_size)[args.process_index]
        batches, shared = [], self.batch_columns(rows)
        for number in range(args.gradient_accumulation_steps):
            size = args.per_device_train_batch_size
            part = own[number * size : (number + 1) * size]
            batch = self.collate([dataset[i] for i in (part if len(part) else rows[:1])])
            batch |= shared
            batch["filler"] = len(part) == 0
            batches.append(send_to_device(batch, args.device))
        return batches

    # --- a round ---------------------------------------------------------------------------------

    def _open(self, index: int, start: int) -> OpenRound:
        """Brings a round to disk and, unless it is past, makes data and model ready for it."""
        args, folder = self.args, round_folder(self.rounds_dir, index)
        begins = self.state.global_step == start
        self.starts.append(start)
        if not begins:
            self._mend(index, REPORT)
        if not begins and not self.is_collected(folder):
            raise PrefoptError(
                f"{folder}: this round is gone but its training has begun; restore the folder, or "
                "delete the checkpoints to begin again"
            )
        seconds: dict[str, float] = {}
        facts: dict[str, float] = {}
        if begins:
            self.before_sampling(index)
        if begins and self.ahead is not None:
            seconds |= self.ahead.wait()
            self.ahead.seconds = {}
            facts["staleness"] = start - (self.current.start if self.current else start)
        if begins:
            self._mend_begun(index)
        seconds |= self.collect(index, folder)
        (report,) = read_lines(folder / "round.json")
        self.reports_of.append(report)
        if self.watcher is not None:
            self.watcher.after_sampling(report, begins)
            if begins:
                self.safe_point()
        rows = self.rows_of_round(index)
        order = row_order(
            rows,
            passes=args.num_train_epochs,
            shuffle=args.train_sampling_strategy == "random",
            seed=(args.seed, index),
        )
        opened = OpenRound(index, start, self._steps(rows), order)
        more = index + 1 < len(self.plan) and opened.end < args.max_steps
        if begins and self.ahead is not None and more:
            ahead = round_folder(self.rounds_dir, index + 1)
            from_main(lambda: clear_damaged(ahead))
            self.ahead.begin(index + 1)  # before training moves the weights
        if self.state.global_step < opened.end:
            for again in self.window(index):
                if again != index or not begins:
                    self._mend(again, self.reads_again)
            with self._way_back(index):
                self.dataset = self.round_dataset(index, moved=not begins)
            if begins:
                facts |= self.begin_training(index)
                if index and args.optimizer_state == "fresh":
                    self.optimizer.state.clear()
        if index == len(self.plan) - 1:
            self.state.max_steps = min(args.max_steps, opened.end)
        if begins:
            self.announce(opened, report | seconds | facts)
        return opened

    def _mend_begun(self, index: int) -> None:
        """Has damaged files of a round that begins made again, as it is brought to disk."""
        folder = round_folder(self.rounds_dir, index)
        past = self.ahead is not None and index > 0  # the policy that was sampled ahead

        def clear() -> None:
            with self._way_back(index, since=index - past):
                clear_damaged(folder, past=past)

        from_main(clear)

    def _mend(self, index: int, *names: str) -> None:
        """Has damaged files of a round made again whose policy is past; they must be the same."""
        folder = round_folder(self.rounds_dir, index)

        def clear() -> dict[Path, str]:
            with self._way_back(index):
                return clear_damaged_results(folder, names)

        def check() -> None:
            with self._way_back(index):
                check_made_again(expected)

        expected = from_main(clear)
        if not expected:
            return
        collector, self.collector = self.collector, replace(self.collector, past=True)
        try:
            with self._way_back(index):
                self.collect(index, folder)
        finally:
            self.collector = collector
        from_main(check)

    @contextmanager
    def _way_back(self, index: int, since: int | None = None) -> Iterator[None]:
        """Has an error about damaged files of a round say how to go on all the same.

        Args:
            index: Number of the round.
            since: Number of the round that begins with the policy that sampled it; itself.
        """
        try:
            yield
        except DamagedError as error:
            start = self.starts[index if since is None else since]
            folder = round_folder(self.rounds_dir, index)
            advice = way_back(Path(self.args.output_dir), start, folder)
            raise PrefoptError(f"{error.damage}; {advice}") from error

    def choose_layout_once(self, trees: Sequence[PromptTree]) -> None:
        """Decides on the layout by the first rows there are."""
        if trees and not self.layout_chosen:
            self.choose_layout(trees)
            self.layout_chosen = True

    def progress(
        self, index: int, name: str, total: int
    ) -> AbstractContextManager[Callable[[int], None]]:
        """A bar for a part of the collecting of a round."""
        show = self.accelerator.is_main_process and len(self.plan[index].prompts) >= SHOWN_PROMPTS
        return progress_bar(f"round {index + 1}: {name}", total, show)

    def _steps(self, rows: int) -> int:
        """Optimiser steps over so many rows, all passes together."""
        return math.ceil(math.ceil(rows * self.args.num_train_epochs) / self.args.global_batch)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint is one to go on from: what the next round is sampled from is gone by then,
        so its samples are waited for. If they fail, what was trained is saved all the same.
        """
        try:
            if self.ahead is not None:
                self.ahead.wait()
        finally:
            super()._save_checkpoint(model, trial)

    # --- the learning rate -----------------------------------------------------------------------

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The schedule asked for, over every round by itself or over all of them."""
        if self.lr_scheduler is None:
            scheduler = LambdaLR(optimizer or self.optimizer, self._share_of_peak)
            self.lr_scheduler: LRScheduler | None = scheduler
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _share_of_peak(self, step: int) -> float:
        """The learning rate of a step as a share of its peak.

        Where one schedule spans all rounds, a round takes the part that was planned for it, though
        it may have fewer steps than planned for want of pairs; unless ``max_steps`` ends the run
        before, which the schedule then follows step by step.
        """
        current, args = self.current, self.args
        if current is None or current.steps == 0:
            return 1.0
        within = min(step - current.start, current.steps)
        if args.optimizer_state == "fresh":
            return schedule(args, current.steps)(within)
        planned = sum(self.planned_steps)
        if args.max_steps < planned:
            return schedule(args, args.max_steps)(min(step, args.max_steps))
        before = sum(self.planned_steps[: current.index])
        share = within / current.steps * self.planned_steps[current.index]
        return schedule(args, planned)(before + share)

    def _set_learning_rate(self) -> None:
        """Sets the rate of the step to come, which was not known when the last one ended."""
        scheduler = self.lr_scheduler
        if scheduler is not None and self._created_lr_scheduler:
            share = self._share_of_peak(self.state.global_step)
            rates = [rate * share for rate in scheduler.base_lrs]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    # --- what is handed in -----------------------------------------------------------------------

    @property
    def policy(self) -> nn.Module:
        """The policy without the wrappers of training."""
        return self.accelerator.unwrap_model(self.model_wrapped)

    @property
    def initial_weights(self) -> Path:
        """Where the trained weights are kept that the run began with."""
        return self.rounds_dir / "initial"

    def _facts(self, peft_config: Any) -> dict[str, Any]:
        """What the rounds on disk depend on; those of a run that differs are not this run's."""
        judge = self.judge
        rule = getattr(getattr(judge, "function", None), "__qualname__", None)
        return {
            "weights": self.fingerprint,
            "adapter": None if peft_config is None else adapter_facts(peft_config),
            "judge": judge and " ".join(filter(None, (type(judge).__name__, rule))),
            "judge's weights": judge_fingerprint(judge),
            "prompts": self.prompts.fingerprint,
            "sampling": [asdict(part) for part in self.sampling],
            "engine": type(self.engine).__name__,
            "plan": [len(planned.prompts) for planned in self.plan],
            "global_batch": self.args.global_batch,
            "precision": str(self.compute_dtype),
            **settings_of(self.args),
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the number of the round."""
        if "loss" in logs and self.current is not None:
            logs = {**logs, "round": self.current.index}
        super().log(logs, start_time)


class _AfterSteps(TrainerCallback):
    """What an algorithm does after a step; with the strategy ``epoch``, a checkpoint after every
    round, before the next is sampled.
    """

    def __init__(self, trainer: RoundTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()
        state.epoch = state.global_step / state.max_steps  # transformers counts from a restart
        current = self.trainer.current
        over = current is not None and state.global_step == current.end
        if over and args.save_strategy == "epoch" and state.global_step < state.max_steps:
            control.should_save = True  # after the last step transformers saves by itself


def judge_fingerprint(judge: Judge | None) -> str | None:
    """A hash of the judge's weights, or of the files they are served from; a rule has neither.

    All processes call this.
    """
    model = getattr(judge, "model", None)
    if isinstance(model, nn.Module):
        return shared_fingerprint(model)
    return getattr(judge, "fingerprint", None)


def check_judge(name: str, asks: Sequence[str], judge: object) -> None:
    """Checks that a judge can answer what an algorithm asks.

    Raises:
        PrefoptError: It is no judge, or it only compares where scores are asked for.
    """
    if isinstance(judge, type) or not all(callable(getattr(judge, ask, None)) for ask in asks):
        raise PrefoptError(
            f"judge: found {type(judge).__name__}, but {name} needs one with {' and '.join(asks)}; "
            "prefopt.reward_models has RewardModel.from_pretrained, PreferenceModel and, for a "
            "function, RuleJudge"
        )
    if asks == ("score",) and getattr(judge, "compares_only", False):
        raise PrefoptError(
            f"{name} needs a score of each answer by itself, but {type(judge).__name__} only "
            "compares answers to one prompt; use a reward model or a rule, or an algorithm that "
            "compares (online_dpo, inpo, nash_mp)"
        )
