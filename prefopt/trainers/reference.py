"""Reference log-probs of a data set: computed once before training, kept beside the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.models.forward import enable_trees
from prefopt.models.gathered import is_partitioned
from prefopt.models.logprobs import sequence_log_probs
from prefopt.preemption import leave_if_asked
from prefopt.rounds.log_probs import (
    ANEW,
    LogProbShards,
    fill_shards,
    store_key,
    trees_fingerprint,
    weights_fingerprint,
)
from prefopt.rounds.processes import from_main
from prefopt.rounds.sums import DamagedError
from prefopt.trainers.base import TreeDataset, TreeTrainer

logger = logging.getLogger(__name__)

SHOWN_ROWS = 256  # fewer are not worth a word: small rounds read some at every step


def shared_fingerprint(model: nn.Module) -> str:
    """The fingerprint of the main process's weights, on every process; all of them call this."""
    parted = any(map(is_partitioned, model.parameters()))  # ZeRO-3 does so as it loads a model
    asked = parted or PartialState().is_main_process
    fingerprint = [weights_fingerprint(model) if asked else ""]
    broadcast_object_list(fingerprint)
    return fingerprint[0]


def reference_log_probs(
    trainer: TreeTrainer,
    dataset: TreeDataset,
    fingerprint: str,
    *,
    adapter: bool,
    resumed: bool,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Reads the reference log-probs of a data set, computing first what is not on disk.

    Args:
        trainer: The trainer, with its model wrapped; before the first step it is the reference.
        dataset: The trees.
        fingerprint: Of the reference's weights.
        adapter: Whether the reference is the model under its adapter.
        resumed: Whether the weights have moved since; then an adapter model can still compute, and
            another one is loaded anew (``trainer.load_start``) if it must.
        temperature: Of the distribution that is read.

    Returns:
        One float32 tensor [completions] a tree.

    Raises:
        PrefoptError: The run was resumed and the stored values are gone.
    """
    args, accelerator = trainer.args, trainer.accelerator
    key = store_key(
        fingerprint,
        trees_fingerprint(dataset.trees),
        args.max_prompt_length,
        args.max_length,
        trainer.compute_dtype,
        trainer.layout,
        temperature,
    )
    folder = Path(args.log_probs_dir or Path(args.output_dir) / "log_probs") / f"reference-{key}"
    unwrapped = accelerator.unwrap_model(trainer.model_wrapped)
    moved = resumed and not adapter
    start = _start(trainer, dataset.trees, folder, fingerprint) if moved else None
    return stored_log_probs(
        trainer,
        dataset.trees,
        folder,
        weights=unwrapped.disable_adapter() if adapter else nullcontext(),
        moved=moved and start is None,
        model=start,
        read=partial(sequence_log_probs, temperature=temperature),
    )


def _start(
    trainer: TreeTrainer, trees: Sequence[PromptTree], folder: Path, fingerprint: str
) -> nn.Module | None:
    """The model that a run began with, where its log-probs are not whole and it can be had."""
    shards = LogProbShards(folder, [len(tree.completions) for tree in trees])
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if trainer.load_start is None or sharded or from_main(shards.are_whole):
        return None
    model = trainer.load_start()
    if shared_fingerprint(model) != fingerprint:
        return None
    enable_trees(model)
    return model.to(trainer.args.device)


def stored_log_probs(
    trainer: TreeTrainer,
    trees: Sequence[PromptTree],
    folder: Path,
    *,
    weights: AbstractContextManager[Any],
    moved: bool,
    model: nn.Module | None = None,
    read: Callable[[nn.Module, TreeBatch], Tensor] = sequence_log_probs,
    sizes: Sequence[int] | None = None,
) -> list[Tensor]:
    """Reads log-probs under frozen weights, computing first what is not on disk.

    Args:
        trainer: The trainer, with its model wrapped.
        trees: The trees.
        folder: Where they are kept; its name says what they depend on.
        weights: Gives the model those weights; entered only if something is missing.
        moved: Whether the weights are past, so that nothing can be computed any more.
        model: The model; by default the trainer's.
        read: The numbers of a batch; by default the sum of each completion's log-probs.
        sizes: How many numbers each tree has; by default one a completion.

    Returns:
        One float32 tensor [size] a tree.

    Raises:
        PrefoptError: Something is missing or damaged and the weights are past.
        Preempted: SIGTERM came; the shards that were being made then are on disk.
    """
    args, accelerator = trainer.args, trainer.accelerator
    shards = LogProbShards(folder, sizes or [len(tree.completions) for tree in trees])
    if not moved:
        from_main(shards.set_aside_damaged)
    missing = shards.missing()
    accelerator.wait_for_everyone()  # no rank may write before all have seen what is missing
    if missing and moved:
        raise DamagedError(
            f"{folder}: log-probs of this run are gone and its weights have moved",
            "restore the folder, or delete the checkpoints to begin again",
        )
    if missing:
        model = model or trainer.model_wrapped
        model.eval()
        rows = sum(len(shards.trees_in(s)) for s in missing)
        with (
            weights,
            accelerator.autocast(),
            progress_bar(
                f"log-probs ({folder.name})",
                rows // accelerator.num_processes,
                show=accelerator.is_main_process and rows >= SHOWN_ROWS,
            ) as step,
        ):
            fill_shards(
                shards,
                trees,
                model,
                read,
                missing=missing,
                layout=trainer.layout,
                batch_size=args.per_device_eval_batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                progress=step,
                after_wave=leave_if_asked,
            )
        accelerator.wait_for_everyone()
        if rows >= SHOWN_ROWS:
            logger.info("log-probs of %d rows: %s", len(trees), folder)
    return shards.load(
        "the weights that gave them have moved: restore the file, or delete the checkpoints to "
        "begin again"
        if moved
        else ANEW
    )


def report_initial_margins(trainer: TreeTrainer, dataset: TreeDataset, beta: float) -> float:
    """Logs the reward margins of the first rows before the first step; they must be about 0.

    Args:
        trainer: The trainer, before its first step.
        dataset: Pairs with a column ``reference``.
        beta: Of the reward.

    Returns:
        The largest absolute margin, in units of reward (beta times nats).
    """
    rows = [dataset[i] for i in range(min(trainer.args.train_batch_size, len(dataset)))]
    batch = trainer.collate(rows)
    trainer.model_wrapped.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        log_probs = sequence_log_probs(
            trainer.model_wrapped, batch["trees"].to(trainer.accelerator.device)
        )
    ratios = log_probs.cpu() - batch["reference"]
    margins = beta * (ratios[0::2] - ratios[1::2])
    largest = margins.abs().max().item()
    logger.info(
        "step 0: reward margins mean %.2e, largest %.2e (both must be about 0)",
        margins.mean().item(),
        largest,
    )
    half = trainer.args.bf16 or trainer.args.fp16
    if largest > beta * (5.0 if half else 0.05):
        logger.warning(
            "step 0: the policy's margins against its own reference should be 0 but reach %.3g; "
            "policy and reference differ in weights, precision or dropout",
            largest,
        )
    return largest


@contextmanager
def progress_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A transient bar on stderr; yields a function to be told of each advance."""
    console = Console(stderr=True)
    show = show and console.is_terminal  # elsewhere it would leave empty lines
    with Progress(console=console, disable=not show, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)
