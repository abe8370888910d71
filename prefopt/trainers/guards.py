"""What stops a run whose numbers are no longer numbers, and the batch it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback

from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.rounds.storage import atomic_write
from prefopt.trainers.early_end import EndsEarly


class FiniteSteps(EndsEarly):
    """A Trainer that takes no step whose loss or gradient is not finite."""

    def __init__(self, **kwargs: Any) -> None:
        self._step: list[tuple[dict[str, Any], Tensor]] = []  # micro-batches and their losses
        super().__init__(**kwargs)
        self.add_callback(_NewStep(self))

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision forward passes run in: autocast's, or that of the weights."""
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else next(self.model.parameters()).dtype

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward pass; remembers the micro-batch for as long as its step lasts."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.append((inputs, loss))
        return loss

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Every step comes by here once, between its last backward pass and the optimiser."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # its search for a scale overflows on purpose
        self.check_finite(**({} if norm is None or scaled else {"gradient": norm}))
        return norm

    def check_finite(self, **norms: Tensor | float) -> None:
        """Stops the run, on all processes together, before the optimiser takes a step.

        Args:
            **norms: Norms of gradients and their names; the losses of the step's micro-batches are
                looked at as well. A further model's trainer hands in the norm of its own.

        Raises:
            PrefoptError: A loss or a norm is infinite or not a number. The step's micro-batches are
                in ``OUTPUT_DIR/non-finite`` then, see :func:`write_step`.
        """
        found = not_finite(self.accelerator, [loss for _, loss in self._step], norms)
        if not found:
            return
        output_dir, step = Path(self.args.output_dir), self.state.global_step + 1
        path = output_dir / "non-finite" / f"step-{step:06d}-process-{self.args.process_index}.json"
        write_step(path, step, found, norms, self._step)
        checkpoint = self.newest_checkpoint()
        error = finite_error(step, found, path, checkpoint, self.args, self.compute_dtype)
        if self.watcher is not None:
            self.watcher.write_down("not_finite", str(error))
        self.accelerator.wait_for_everyone()  # the first to fail has the launcher end the others
        raise error


class _NewStep(TrainerCallback):
    def __init__(self, trainer: FiniteSteps) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._step.clear()


def not_finite(
    accelerator: Accelerator, losses: Sequence[Tensor], norms: Mapping[str, Tensor | float]
) -> list[str]:
    """Names what is infinite or not a number on any process; waits for the device once.

    Args:
        accelerator: The one that trains; all processes call this with the same names.
        losses: This process's losses of the step, scalars.
        norms: Norms of gradients and their names, scalars.

    Returns:
        ``loss`` and names of ``norms``, the same on every process; empty where all is well.
    """
    device = accelerator.device
    values = {"loss": torch.stack([loss.float() for loss in losses])} if losses else {}
    for name, norm in norms.items():
        values[name] = torch.as_tensor(_whole(norm), device=device)
    if not values:
        return []
    bad = torch.stack([1 - value.isfinite().all().int() for value in values.values()])
    counts = accelerator.reduce(bad, "sum").tolist()
    return [name for name, count in zip(values, counts, strict=True) if count]


def write_step(
    path: Path,
    step: int,
    found: Sequence[str],
    norms: Mapping[str, Tensor | float],
    micro_batches: Sequence[tuple[Mapping[str, Any], Tensor]],
) -> None:
    """Writes what a step was made of, so that it can be read and played again.

    The file is JSON as Python's ``json`` reads it, ``NaN`` and ``Infinity`` included: ``step``,
    ``not_finite``, ``norms`` and ``micro_batches``, each with its ``loss`` (its share of the step's
    loss, as it was added up), its ``trees`` (``index`` in the data set, ``prompt`` and
    ``completions`` as token ids) and its ``columns`` as the loss saw them; SFT has columns alone.

    Args:
        path: The file.
        step: The number of the step, from 1.
        found: What was not finite.
        norms: Norms of gradients and their names.
        micro_batches: This process's, with their losses.
    """
    content = {
        "step": step,
        "not_finite": list(found),
        "norms": {name: float(_whole(norm)) for name, norm in norms.items()},
        "micro_batches": [
            {"loss": loss.item()} | _readable(inputs) for inputs, loss in micro_batches
        ],
    }
    atomic_write(path, json.dumps(content, default=_as_json) + "\n")


def unpack_trees(batch: TreeBatch) -> list[PromptTree]:
    """The trees that ``collate_trees`` packed, in either layout.

    Examples:
        >>> from prefopt.data.tree import collate_trees
        >>> unpack_trees(collate_trees([PromptTree([5, 6], [[7, 8], [9]])]))
        [PromptTree(prompt=[5, 6], completions=[[7, 8], [9]])]
    """
    ids, positions = batch.input_ids.flatten().tolist(), batch.position_ids.flatten().tolist()
    prompts: dict[int, list[int]] = {}
    completions: dict[int, list[list[int]]] = {}
    first = 0
    for tree, length in zip(batch.tree_of.tolist(), batch.lengths.tolist(), strict=True):
        end = int(batch.predict_from[first])  # the prompt's last token predicts the first one
        prompts[tree] = ids[end - positions[end] : end + 1]
        completion = batch.targets[first : first + length].tolist()
        completions.setdefault(tree, []).append(completion)
        first += length
    return [PromptTree(prompts[tree], completions[tree]) for tree in range(batch.num_trees)]


def finite_error(
    step: int, found: Sequence[str], path: Path, checkpoint: Path | None, args: Any, dtype: Any
) -> PrefoptError:
    """The error that says what was not finite, where its batch is, and what to try.

    Args:
        step: The number of the step, from 1.
        found: What was not finite.
        path: Where ``write_step`` wrote the step.
        checkpoint: The last complete one, if there is any.
        args: The trainer's ``TrainingArguments``.
        dtype: The precision forward passes run in.
    """
    last = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint yet"
    precision = "" if dtype == torch.float32 else f", or float32 in place of {dtype}"
    return PrefoptError(
        f"step {step}: not finite: {', '.join(found)}; the run stops before it is saved. Its "
        f"batch is in {path}; {last}. The same settings would end here again: look at the batch, "
        f"and try a lower learning_rate (now {args.learning_rate:g}), a lower max_grad_norm (now "
        f"{args.max_grad_norm:g}; 0 is none){precision}"
    )


def _whole(norm: Any) -> Any:
    """A sharded model's norm comes as a DTensor, of which a process holds a part."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _readable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    if "trees" not in inputs:
        return {"trees": [], "columns": dict(inputs)}
    indices = inputs["index"].tolist()
    trees = [
        {"index": index, "prompt": tree.prompt, "completions": tree.completions}
        for index, tree in zip(indices, unpack_trees(inputs["trees"]), strict=True)
    ]
    return {
        "trees": trees,
        "columns": {k: v for k, v in inputs.items() if k not in ("index", "trees")},
    }


def _as_json(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)
