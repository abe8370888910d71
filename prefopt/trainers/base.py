"""The trainer all algorithms share: transformers' Trainer on batches of prompt trees.

An algorithm implements ``tree_losses`` and, where it needs frozen log-probs, calls
``store_log_probs`` before training begins. Everything else (optimiser, schedule, sharding,
checkpoints, trackers) is transformers' and accelerate's.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from prefopt.data.tree import Layout, PromptTree, TreeBatch, collate_trees
from prefopt.disk import check_space, writing
from prefopt.errors import PrefoptError
from prefopt.models.adapter import sets_in_order
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.layout_check import layout_for
from prefopt.preemption import begin_worker
from prefopt.rounds.processes import from_main
from prefopt.trainers.checkpoints import (
    ASIDE,
    finish_checkpoint,
    last_complete_checkpoint,
    problem_of,
    remove_leftovers,
    rotate,
    size_of_next,
)
from prefopt.trainers.guards import FiniteSteps
from prefopt.trainers.sharding import check_saves_whole
from prefopt.trainers.unpickling import check_pickles, watched

logger = logging.getLogger(__name__)


@dataclass
class TreeTrainerConfig(TrainingArguments):
    """transformers' TrainingArguments with the defaults and the few keys that trees need."""

    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Longer prompts are dropped and counted; null: no limit."}
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Limit for prompt + completion, in tokens, likewise."}
    )
    layout: str = field(
        default="auto",
        metadata={"help": "tree | separate | auto (trees where a check on real rows passes)."},
    )
    log_probs_dir: str | None = field(
        default=None, metadata={"help": "Where frozen log-probs are kept; OUTPUT_DIR/log_probs."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set the model's own dropout to 0."}
    )
    learning_rate: float = field(default=5e-7, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained weight takes part in every loss."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Never hide a loss that is not finite."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false."})

    def __post_init__(self) -> None:
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise PrefoptError(
                f"train_sampling_strategy: found {self.train_sampling_strategy!r}, expected random "
                "or sequential: rows of trees have no padding to save"
            )
        if self.layout not in ("auto", "tree", "separate"):
            raise PrefoptError(f"layout: found {self.layout!r}, expected auto, tree or separate")
        super().__post_init__()


class TreeDataset(Dataset):
    """Trees and, row by row, whatever else a loss needs.

    Attributes:
        trees: The trees.
        columns: Further values, each as long as ``trees``: numbers, or tensors of which a batch
            concatenates those of its rows.
    """

    def __init__(
        self, trees: Sequence[PromptTree], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> None:
        self.trees = trees
        self.columns: dict[str, Sequence[Any]] = dict(columns or {})

    def __len__(self) -> int:
        return len(self.trees)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: values[index] for name, values in self.columns.items()}
        return {"index": index, "tree": self.trees[index], **row}


class Evaluator(Protocol):
    """Looks at the policy between two epochs or rounds."""

    def after(self, done: int) -> bool:
        """Runs when so many epochs or rounds are done and saved; True ends training.

        To end it with an error, it calls the trainer's ``end_early``.
        """
        ...


class CompleteCheckpoints(FiniteSteps):
    """A Trainer whose checkpoints count only once their last file is on the disk."""

    evaluator: Evaluator | None = None
    _output_dir: str | None = None  # while a checkpoint is written aside

    def __init__(self, *, args: Any, **kwargs: Any) -> None:
        if args.save_total_limit == 1:
            raise PrefoptError(
                "save_total_limit=1 would delete the last good checkpoint before the next one is "
                "complete; set 2 or more"
            )
        if args.save_only_model:
            raise PrefoptError(
                "save_only_model=true would leave checkpoints that a killed run cannot go on from, "
                "since optimiser and random generators are not in them; leave it out"
            )
        if args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible and one is used; start with `accelerate launch "
                "--num_processes %d -m prefopt train RECIPE` to use all",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1  # nn.DataParallel cannot split trees
        if args.device.type == "cpu":  # cpu:0 among several processes: torch.load knows no such
            vars(args)["_setup_devices"] = torch.device("cpu")
        super().__init__(args=args, **kwargs)
        self.add_callback(_EmptyEpochs())
        self.started = time.monotonic()  # earlier by what the processes before this one trained
        check_saves_whole(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as transformers does, from a checkpoint whose pickles hold numbers only.

        Raises:
            PrefoptError: One holds something else.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True
        if isinstance(resume_from_checkpoint, str):
            check_pickles(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of the next step; none where an evaluation ends training, or where a
        run was resumed with its last step taken, which transformers sees at the end of epochs only.
        """
        with self.saved_on_early_end():
            self.safe_point()
            if self.state.global_step >= self.state.max_steps:
                self.control.should_training_stop = True
                return [], None
            epoch = self.state.epoch or 0.0
            if epoch and epoch == int(epoch):
                if self.ends_after(int(epoch)):
                    return [], None
                self.safe_point()  # an evaluation may have taken long, or have set off a guard
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint that was written to its end."""
        return last_complete_checkpoint(Path(self.args.output_dir))

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        base = loader.base_dataloader
        # its own: a pass would draw from the global one, unless its workers outlived the last pass
        base.generator = torch.Generator()
        base.worker_init_fn = partial(begin_worker, base.worker_init_fn)
        return loader

    def ends_after(self, done: int) -> bool:
        """Has the policy evaluated before the next epoch or round begins.

        Here and not when the last one ended, because its checkpoint is on disk by now.

        Args:
            done: Epochs or rounds so far.

        Returns:
            Whether training ends here.
        """
        if self.evaluator is not None and self.evaluator.after(done):
            self.control.should_training_stop = True
        return self.control.should_training_stop

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves whole weights; under FSDP too, whatever form it keeps the state of training in."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        with sets_in_order(self.model):
            if plugin is None:
                super().save_model(output_dir, _internal_call)
                return
            chosen = plugin.state_dict_type
            plugin.set_state_dict_type("FULL_STATE_DICT")  # of others nothing would be saved here
            super().save_model(output_dir, _internal_call)
            plugin.set_state_dict_type(chosen)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside, and gives it its name once its last file is on the disk.

        Raises:
            PrefoptError: The disk is full, or has no room for it; older checkpoints stay as they
                are.
        """
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        final = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        aside = output_dir / ASIDE
        partial = aside / final.name
        saves = self.args.should_save

        def begin() -> None:
            remove_leftovers(output_dir)
            check_space(final, size_of_next(self), final.name)

        from_main(begin)
        self._output_dir = str(aside)
        try:
            with writing(final, final.name):
                super()._save_checkpoint(model, trial)
                self.save_extra(partial)
                self.accelerator.wait_for_everyone()
                if self.state.best_model_checkpoint == str(partial):
                    self.state.best_model_checkpoint = str(final)
                    if saves:
                        self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
                if saves:
                    finish_checkpoint(partial, final, time.monotonic() - self.started)
        finally:
            self._output_dir = None
            if saves:  # what is half-written would fill the disk
                shutil.rmtree(aside, ignore_errors=True)
        if saves:
            rotate(output_dir, self.args.save_total_limit, step, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _load_best_model(self) -> None:
        """Ends training with the weights of the best evaluation.

        Raises:
            PrefoptError: They are damaged, or not plain numbers.
        """
        best = Path(str(self.state.best_model_checkpoint))
        if problem := from_main(partial(problem_of, best, sums=True)):
            raise PrefoptError(
                f"{problem}; this is the best checkpoint, which the run is to end with: restore "
                "the file, or delete the checkpoints to begin again"
            )
        check_pickles(best)
        # DeepSpeed's have names of its own, which were looked at
        with nullcontext() if self.is_deepspeed_enabled else watched(best):
            super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes a checkpoint and deletes others."""
        return self._output_dir or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint has its name."""

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with watched(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with watched(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        self.load_extra(Path(checkpoint))

    def save_extra(self, folder: Path) -> None:
        """Adds what else an algorithm trains to a checkpoint; runs on every process.

        Args:
            folder: The checkpoint's, which counts only once this has returned everywhere.
        """

    def load_extra(self, folder: Path) -> None:
        """Reads back what ``save_extra`` wrote; runs on every process of a resumed run.

        Model, optimiser and schedule are loaded by then; ``before_training`` and the first step
        are still to come.

        Args:
            folder: The checkpoint's.
        """


class _EmptyEpochs(TrainerCallback):
    """An epoch without a step, as training may end with, leaves nothing to log, judge or save."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.begun:
            control.should_log = control.should_evaluate = control.should_save = False


class TreeTrainer(CompleteCheckpoints):
    """Base of all trainers; see the module's docstring.

    Args:
        model: A loaded model; ``peft_config`` wraps it in an adapter.
        args: The algorithm's configuration.
        train_dataset: Trees to train on (a ``TreeDataset``), or what an algorithm makes them of.
        eval_dataset: Held-out trees.
        processing_class: The policy's tokenizer, saved beside the weights.
        peft_config: A PEFT configuration such as ``LoraConfig``.
        **kwargs: What else ``transformers.Trainer`` takes (callbacks, optimizers).

    Attributes:
        load_start: Loads the model anew that training began with, if something can.
    """

    load_start: Callable[[], nn.Module] | None = None

    def __init__(
        self,
        model: nn.Module,
        args: TreeTrainerConfig,
        train_dataset: Any,
        eval_dataset: TreeDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.disable_dropout:
            disable_dropout(model)
        if peft_config is not None:  # after that, so that an adapter keeps the dropout it asks for
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        enable_trees(model)
        self.layout: Layout = "tree"
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._check_precision()
        # tells Trainer that compute_loss divides by the whole global batch itself
        self.model_accepts_loss_kwargs = True
        self._metrics: dict[str, _Averages] = {"train": _Averages(), "eval": _Averages()}
        self._tokens, self._clock = 0, time.perf_counter()
        self.add_callback(_Beginnings(self))

    def _check_precision(self) -> None:
        found = self.accelerator.mixed_precision
        expected = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no"
        if found != expected:
            raise PrefoptError(
                f"mixed_precision: found {found} in accelerate's configuration, but the trainer's "
                f"bf16={self.args.bf16} and fp16={self.args.fp16}; make them agree"
            )

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One loss a tree and the metrics to average, each [trees]; the algorithm's part.

        Args:
            model: The policy, wrapped as it trains.
            inputs: ``trees`` (a TreeBatch), ``index`` [trees], and the data set's columns.
        """
        raise NotImplementedError

    def length_metrics(self, trees: TreeBatch) -> dict[str, Tensor]:
        """Tokens of the completions; two of them are a pair, the chosen one first."""
        lengths = trees.lengths.float()
        if trees.num_completions != 2 * trees.num_trees:
            return {"length/mean": lengths}
        return {
            "length/mean": lengths,
            "length/chosen": lengths[0::2],
            "length/rejected": lengths[1::2],
        }

    def add_metrics(self, values: dict[str, Tensor]) -> None:
        """Averages values into the next line of the training log."""
        self._metrics["train"].add(values)

    def before_training(self, resumed: bool) -> None:
        """Runs once the model is wrapped, before the first step; decides on the layout."""
        self.choose_layout(self.train_dataset.trees)

    def choose_layout(self, trees: Sequence[PromptTree]) -> None:
        """Takes the layout asked for, or the one that a check on the first trees finds right."""
        if self.args.layout != "auto":
            self.layout = self.args.layout
        elif not supports_tree_attention(self.model):
            logger.warning("this model's attention cannot run on trees: layout 'separate'")
            self.layout = "separate"
        else:
            self.model_wrapped.eval()
            first = trees[: 4 * self.args.train_batch_size]
            self.layout = layout_for(self.model_wrapped, first, self.compute_dtype)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A list of data-set rows as one batch."""
        batch: dict[str, Any] = {"index": torch.tensor([row["index"] for row in rows])}
        batch["trees"] = collate_trees([row["tree"] for row in rows], layout=self.layout)
        for name in rows[0].keys() - {"index", "tree"}:
            values = [row[name] for row in rows]
            joined = isinstance(values[0], Tensor)
            batch[name] = torch.cat(values) if joined else torch.tensor(values)
        return batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The sum of losses over the number of trees in the global batch, times the ranks."""
        trees: TreeBatch = inputs["trees"]
        losses, metrics = self.tree_losses(model, inputs)
        metrics |= self.length_metrics(trees)
        mode = "train" if model.training else "eval"
        if inputs.get("filler"):  # there so that all processes take the same steps, and log alike
            self._metrics[mode].add({name: value[:0] for name, value in metrics.items()})
            return losses.sum() * 0
        self._metrics[mode].add(metrics)
        if mode == "train":
            self._tokens += trees.input_ids.numel()
        if num_items_in_batch is None:
            loss = losses.mean()
        else:  # DDP and FSDP average over ranks, hence the factor
            loss = losses.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"losses": losses}) if return_outputs else loss

    def ends_after(self, done: int) -> bool:
        """Leaves the time it takes out of the speed of training."""
        begun = time.perf_counter()
        ends = super().ends_after(done)
        self._clock += time.perf_counter() - begun
        return ends

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        count = torch.tensor(sum(b["trees"].num_trees for b in batch_samples), device=device)
        return self.accelerator.gather(count).sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 FLOPs per parameter and token, embeddings left out."""
        parameters = self.accelerator.unwrap_model(self.model).num_parameters(
            exclude_embeddings=True
        )
        return 6 * inputs["trees"].input_ids.numel() * parameters

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Loss and metrics without gradients."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averaged metrics and the speed since the last line."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        prefix = "eval_" if mode == "eval" else ""
        if mode == "eval" or "loss" in logs:
            averages = self._metrics[mode].drain(self.accelerator)
            logs = logs | {prefix + name: value for name, value in averages.items()}
        if mode == "train" and "loss" in logs:
            now = time.perf_counter()
            tokens = self.accelerator.gather(torch.tensor(self._tokens, device=self.args.device))
            logs["tokens_per_second"] = tokens.sum().item() / (now - self._clock)
            self._tokens, self._clock = 0, now
        super().log(logs, start_time)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability that a model's modules hold to 0, layer dropout included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


class _Averages:
    """Means of named values over rows, kept on the device until they are logged."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float().sum()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def drain(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes, in one collective; begins anew."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        table = torch.stack(
            [torch.stack([self.sums[n].cpu(), torch.tensor(float(self.counts[n]))]) for n in names]
        )
        total = accelerator.reduce(table.to(accelerator.device), "sum").cpu()
        self.clear()
        counted = zip(names, total, strict=True)
        return {name: (row[0] / row[1]).item() for name, row in counted if row[1]}


class _Beginnings(TrainerCallback):
    def __init__(self, trainer: TreeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_training(resumed=state.global_step > 0)
        self.trainer._clock = time.perf_counter()
