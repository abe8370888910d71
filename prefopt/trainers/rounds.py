"""Training in rounds: collect samples of the policy, judge them, pair them, optimise, begin again.

One call of ``train`` runs all rounds on one model, one optimiser and one series of checkpoints.
transformers' loop asks for the micro-batches of one optimiser step at a time; a round is collected
when a step is asked for that the rounds before it do not hold, so that nothing is ever sampled from
a policy older than the last step.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate
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
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.rollout.engine import Completion, Engine, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.collect import (
    Collector,
    collect_round,
    is_collected,
    read_round,
    sampled_trees,
)
from prefopt.rounds.plan import plan_rounds, row_order
from prefopt.rounds.storage import atomic_write, remove_partial
from prefopt.rounds.store import read_lines, round_folder
from prefopt.rounds.weights import load_trainable, save_trainable, weights_of
from prefopt.trainers.base import TreeDataset, TreeTrainer
from prefopt.trainers.reference import (
    progress_bar,
    report_initial_margins,
    shared_fingerprint,
    stored_log_probs,
)
from prefopt.trainers.round_config import (
    RoundConfig,
    adapter_facts,
    check_sampling,
    prompt_rows,
    schedule,
    settings_of,
)

logger = logging.getLogger(__name__)


KL_PROMPTS = 256  # prompts whose first sample an estimate of KL takes


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
    """Base of the trainers that sample; an algorithm implements ``tree_losses`` on pairs.

    Args:
        model: The policy; as it is handed in, it is the ``initial`` policy.
        args: The algorithm's configuration.
        train_dataset: Rows with a prompt (docs/data.md), or tokenised prompts.
        judge: What judges the samples.
        sampling: How a prompt is sampled: several settings share its samples out, one after
            another (their ``seed`` and ``first_sample`` are set by the rounds).
        engine: What samples; by default transformers' ``generate`` on the live model.
        processing_class: The policy's tokenizer.
        **kwargs: As for :class:`prefopt.trainers.base.TreeTrainer`.

    Raises:
        PrefoptError: Something is missing, or settings do not go together.
    """

    frozen: tuple[str, ...] = ("reference",)  # log-probs a loss needs: reference, previous

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
        if train_dataset is None or judge is None or processing_class is None:
            raise PrefoptError(
                f"{type(self).__name__} needs train_dataset (prompts), judge and processing_class"
            )
        parts = [sampling] if isinstance(sampling, SamplingSettings) else sampling
        self.sampling = list(parts or [SamplingSettings(samples_per_prompt=2)])
        self.samples_per_prompt = sum(part.samples_per_prompt for part in self.sampling)
        args = copy.copy(args)  # max_steps is this run's, not the caller's
        schedule(args, 1)  # refuses a schedule that needs more than the step
        self.pairing = args.pairing_settings()
        check_sampling(self.pairing, self.sampling)
        longest = max(part.max_new_tokens for part in self.sampling)
        self.prompts = prompt_rows(args, train_dataset, processing_class, longest)
        self.plan = plan_rounds(
            len(self.prompts),
            rounds=args.rounds,
            prompts_per_round=args.prompts_per_round,
            seed=args.seed,
        )
        self.args = args  # transformers sets it too, but only after its number of steps is asked
        micro_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.global_batch = micro_batch * args.world_size
        self.planned_steps = [self._steps(pairs) for pairs in self._planned_pairs()]
        planned = sum(self.planned_steps)
        args.max_steps = min(planned, args.max_steps) if args.max_steps > 0 else planned
        self.fingerprint = shared_fingerprint(model)  # before an adapter or a checkpoint
        super().__init__(model, args, self.prompts, processing_class=processing_class, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            found = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise PrefoptError(
                f"{type(self).__name__}: found {found}, but rounds need whole weights, and an "
                "optimiser they can begin afresh, in every process; use DDP, with a LoRA adapter "
                "where memory is short"
            )
        self.rounds_dir = Path(args.rounds_dir or Path(args.output_dir) / "rounds")
        engine = engine or TransformersEngine(
            self.model, processing_class, batch_size=args.generation_batch_size
        )
        self.collector = Collector(
            prompts=self.prompts,
            engine=_InPrecisionOf(self, engine),
            judge=judge,
            sampling=self.sampling,
            pairing=self.pairing,
            redraws=args.redraws,
            prompts_per_shard=args.prompts_per_shard,
            seed=args.seed,
        )
        self.current: OpenRound | None = None
        self.facts = self._facts(kwargs.get("peft_config"))
        self.add_callback(_AfterRound(self))

    # --- the loop --------------------------------------------------------------------------------

    def before_training(self, resumed: bool) -> None:
        """Checks that the rounds on disk are this run's, and keeps the initial weights."""
        self.current, self.layout_chosen = None, False
        self.pairs: list[int] = []  # of each round so far
        path, main = self.rounds_dir / "start.json", self.accelerator.is_main_process
        if path.exists():
            found = json.loads(path.read_text())
            different = [name for name, value in self.facts.items() if found.get(name) != value]
            if different:
                raise PrefoptError(
                    f"{self.rounds_dir}: these rounds were begun with other {', '.join(different)};"
                    " choose another folder, or delete this one to begin again"
                )
        if main:
            remove_partial(self.rounds_dir)
        begun = path.exists() and self._initial_weights.exists()
        if main and self._uses_initial_weights and not begun:
            if resumed:
                raise PrefoptError(
                    f"{self._initial_weights}: the weights this run began with are gone; restore "
                    "them, or delete the run folder to begin again"
                )
            save_trainable(self.accelerator.unwrap_model(self.model_wrapped), self._initial_weights)
        if main and not path.exists():
            atomic_write(path, json.dumps(self.facts, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

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
        step = self.state.global_step
        while self.current is None or step >= self.current.end:
            last = self.current
            index, start = (0, 0) if last is None else (last.index + 1, last.end)
            if index == len(self.plan):  # the last rounds gave no pairs
                self.control.should_training_stop = True
                if step == 0:
                    logger.warning("no round gave a pair to train on: the policy is as it was")
                return [], None
            self.current = self._open(index, start)
            self._set_learning_rate()
            self._clock = time.perf_counter()  # tokens a second are those of training
        here = (step - self.current.start) * self.global_batch
        rows = self.current.order[here : here + self.global_batch]
        return self._micro_batches(rows), torch.tensor(len(rows), device=device)

    def _micro_batches(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """This process's share of a global batch, as many micro-batches as every other has.

        Where there are too few rows, a row that does not count keeps the others company.
        """
        args, dataset = self.args, self.dataset
        own = np.array_split(rows, args.world_size)[args.process_index]
        batches = []
        for number in range(args.gradient_accumulation_steps):
            size = args.per_device_train_batch_size
            part = own[number * size : (number + 1) * size]
            batch = self.collate([dataset[i] for i in (part if len(part) else rows[:1])])
            batch["filler"] = len(part) == 0
            batches.append(send_to_device(batch, args.device))
        return batches

    # --- a round ---------------------------------------------------------------------------------

    def _open(self, index: int, start: int) -> OpenRound:
        """Brings a round to disk and, unless it is past, makes data and model ready for it."""
        args, folder = self.args, round_folder(self.rounds_dir, index)
        begins = self.state.global_step == start
        if not begins and not is_collected(folder):
            raise PrefoptError(
                f"{folder}: this round is gone but its training has begun; restore the folder, or "
                "delete the checkpoints to begin again"
            )
        main = self.accelerator.is_main_process
        seconds = collect_round(
            self.collector,
            folder,
            index,
            self.plan[index],
            progress=lambda name, total: progress_bar(f"round {index + 1}: {name}", total, main),
        )
        (report,) = read_lines(folder / "round.json")
        self.pairs.append(report["pairs"])
        window = range(0 if args.data_window == "all_so_far" else index, index + 1)
        rows = sum(self.pairs[k] for k in window)
        order = row_order(
            rows,
            passes=args.num_train_epochs,
            shuffle=args.train_sampling_strategy == "random",
            seed=(args.seed, index),
        )
        opened = OpenRound(index, start, self._steps(rows), order)
        kl: dict[str, float] = {}
        if self.state.global_step < opened.end:
            self.dataset = self._dataset(index, window, moved=not begins)
            if begins and index:
                kl = self._kl(index)
                self._begin_afresh()
        if index == len(self.plan) - 1:
            self.state.max_steps = min(args.max_steps, opened.end)
        if begins:
            self._announce(opened, rows, report | seconds | kl)
            if index == 0 and "reference" in self.frozen and rows:
                report_initial_margins(self, self.dataset, beta=1.0)
        return opened

    def _dataset(self, index: int, window: range, moved: bool) -> TreeDataset:
        """The pairs of some rounds with their frozen log-probs."""
        folders = {k: round_folder(self.rounds_dir, k) for k in window}
        rounds = {k: read_round(folders[k], self.plan[k], self.prompts) for k in window}
        if not self.layout_chosen:
            self.choose_layout(next(r.trees for r in rounds.values() if r.trees))
            self.layout_chosen = True
        labels = [p for collected in rounds.values() for p in collected.p_chosen]
        columns: dict[str, Sequence[Any]] = {}
        if self.args.soft_labels or any(p != 1.0 for p in labels):
            columns["p_chosen"] = labels
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        for name in self.frozen:
            initial = index == 0 or (name == "reference" and self.args.reference == "initial")
            values: list[Tensor] = []
            for k, collected in rounds.items():
                swap = initial and (index > 0 or moved)
                values += stored_log_probs(
                    self,
                    collected.trees,
                    folders[k] / "log_probs" / ("initial" if initial else f"policy-{index:04d}"),
                    weights=weights_of(policy, self._initial_weights) if swap else nullcontext(),
                    moved=moved and not initial,
                )
            columns[name] = values
        trees = [tree for collected in rounds.values() for tree in collected.trees]
        return TreeDataset(trees, columns)

    def _kl(self, index: int) -> dict[str, float]:
        """An estimate of the KL of the policy that sampled from the initial one, in nats."""
        folder = round_folder(self.rounds_dir, index)
        trees = sampled_trees(self.collector, folder, self.plan[index], limit=KL_PROMPTS)
        if not trees or not self._uses_initial_weights:
            return {}
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        weights: dict[str, AbstractContextManager[Any]] = {
            "policy": nullcontext(),
            "initial": weights_of(policy, self._initial_weights),
        }
        own, initial = (
            stored_log_probs(
                self, trees, folder / "log_probs" / f"kl-{name}", weights=context, moved=False
            )
            for name, context in weights.items()
        )
        return {"kl": (torch.cat(own) - torch.cat(initial)).mean().item()}

    def _begin_afresh(self) -> None:
        """Weights and optimiser as a round asks for them, once it is collected."""
        if self.args.initial_policy == "initial":
            policy = self.accelerator.unwrap_model(self.model_wrapped)
            load_trainable(policy, self._initial_weights)
        if self.args.optimizer_state == "fresh":
            self.optimizer.state.clear()

    def _steps(self, rows: int) -> int:
        """Optimiser steps over so many pairs, all passes together."""
        return math.ceil(math.ceil(rows * self.args.num_train_epochs) / self.global_batch)

    def _announce(self, opened: OpenRound, rows: int, facts: dict[str, Any]) -> None:
        """Says and logs what a round begins with."""
        args = self.args
        logger.info(
            "round %d of %d: %d prompts x %d samples, %d pairs (ties: %d dropped, %d kept; "
            "identical: %d); policy: %s; reference: %s; data: %s, %d pairs; optimiser: %s; "
            "%d steps of %d pairs (%d x %d accumulated x %d processes)",
            opened.index + 1,
            len(self.plan),
            facts["prompts"],
            self.samples_per_prompt,
            facts["pairs"],
            facts["ties_dropped"],
            facts["ties_kept"],
            facts["identical"],
            args.initial_policy,
            args.reference,
            args.data_window,
            rows,
            args.optimizer_state,
            opened.steps,
            self.global_batch,
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.world_size,
        )
        self.log(facts)

    def reports(self) -> list[dict[str, Any]]:
        """Counts and means of every round so far, as their ``round.json`` say."""
        paths = (round_folder(self.rounds_dir, k) / "round.json" for k in range(len(self.plan)))
        return [report for path in paths if path.exists() for report in read_lines(path)]

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
    def _initial_weights(self) -> Path:
        return self.rounds_dir / "initial"

    @property
    def _uses_initial_weights(self) -> bool:
        reference = "reference" in self.frozen and self.args.reference == "initial"
        return len(self.plan) > 1 and (reference or self.args.initial_policy == "initial")

    def _facts(self, peft_config: Any) -> dict[str, Any]:
        """What the rounds on disk depend on; those of a run that differs are not this run's."""
        judge = self.collector.judge
        model = getattr(judge, "model", None)  # a rule has none
        rule = getattr(getattr(judge, "function", None), "__qualname__", None)
        return {
            "weights": self.fingerprint,
            "adapter": None if peft_config is None else adapter_facts(peft_config),
            "judge": " ".join(filter(None, (type(judge).__name__, rule))),
            "judge's weights": shared_fingerprint(model) if isinstance(model, nn.Module) else None,
            "prompts": self.prompts.fingerprint,
            "sampling": [asdict(part) for part in self.sampling],
            "plan": [len(planned.prompts) for planned in self.plan],
            "global_batch": self.global_batch,
            "precision": str(self.compute_dtype),
            **settings_of(self.args),
        }

    def _planned_pairs(self) -> list[int]:
        """The pairs of every round's data if there are no ties."""
        independent = self.pairing.pairing == "independent"
        each = self.samples_per_prompt // 2 if independent else 1
        pairs = [each * len(planned.prompts) for planned in self.plan]
        return list(accumulate(pairs)) if self.args.data_window == "all_so_far" else pairs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the number of the round."""
        if "loss" in logs and self.current is not None:
            logs = {**logs, "round": self.current.index}
        super().log(logs, start_time)


class _InPrecisionOf:
    """An engine that samples in the precision the trainer computes in."""

    def __init__(self, trainer: TreeTrainer, engine: Engine) -> None:
        self.trainer, self.engine = trainer, engine

    def generate(self, *args: Any, **kwargs: Any) -> list[list[Completion]]:
        with self.trainer.compute_loss_context_manager():
            return self.engine.generate(*args, **kwargs)


class _AfterRound(TrainerCallback):
    """With the strategy ``epoch``, a checkpoint after every round, before the next is sampled."""

    def __init__(self, trainer: RoundTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        current = self.trainer.current
        over = current is not None and state.global_step == current.end
        if over and args.save_strategy == "epoch" and state.global_step < state.max_steps:
            control.should_save = True  # after the last step transformers saves by itself
