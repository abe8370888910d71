"""Compares trainers step by step: the same weights, rows and optimiser, in random turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from measure import DEVICE, Settings, interleave, parser, peak_mib, report
from torch import Tensor, nn
from transformers import Trainer

MEMORY_STEPS = 4


class Contestant:
    """One trainer, stepped by hand so that several can take turns.

    Args:
        trainer: A trainer with its model.
        rows: The rows as its collator takes them.
        before_loss: Called with each collated batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        rows: Sequence[Any],
        before_loss: Callable[[dict[str, Any]], None] = lambda batch: None,
    ) -> None:
        self.trainer, self.rows, self.before_loss = trainer, rows, before_loss
        self.model = trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Collates the rows and computes their loss."""
        batch = self.trainer.data_collator([self.rows[i] for i in indices])
        batch = self.trainer._prepare_inputs(batch)
        with self.trainer.compute_loss_context_manager():
            self.before_loss(batch)
            return self.trainer.compute_loss(self.model, batch)

    def step(self, indices: Sequence[int]) -> None:
        """A whole training step."""
        self.loss(indices).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, indices: Sequence[int]) -> tuple[float, Tensor]:
        """The loss and its flat gradient; the weights stay."""
        loss = self.loss(indices)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.optimizer.zero_grad()
        return loss.item(), gradient


Builder = Callable[[Settings, str], Contestant]


def training_arguments(settings: Settings, **extra: Any) -> dict[str, Any]:
    """What every trainer is told."""
    return {
        "output_dir": tempfile.mkdtemp(dir=settings.scratch),
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_checkpointing": False,
        "bf16": DEVICE == "cuda",
        "dataloader_pin_memory": DEVICE == "cuda",
        "max_length": None,
        "report_to": "none",
        **extra,
    }


def perturb(model: nn.Module, seed: int) -> None:
    """Moves all weights by a tenth of their tensor's spread, away from the reference."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.add_(0.1 * parameter.std() * noise)


def compare_training(
    name: str, builders: Mapping[str, Builder], modes: Sequence[str], argv: Sequence[str] | None
) -> dict[str, Any]:
    """The main program of a training benchmark.

    Args:
        name: Of the result file.
        builders: Makes each contestant from settings and mode; ours comes first.
        modes: The ways of training to compare them in.
        argv: The command line.

    Returns:
        What the result file holds.
    """
    options = parser(f"Times whole training steps of {', '.join(builders)}.")
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--modes", choices=modes, nargs="+", default=modes)
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    args = options.parse_args(argv)
    runs, memory = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(args.size, args.batch_size, args.steps, args.seed, scratch)
        for mode in args.modes:
            if not args.no_memory:
                memory[mode] = {n: peak_memory(b, settings, mode) for n, b in builders.items()}
            contestants = {n: build(settings, mode) for n, build in builders.items()}
            for threads in args.threads:
                torch.set_num_threads(threads)
                runs.append({"mode": mode, "threads": threads} | _turns(contestants, settings))
    return report(name, args, settings, runs=runs, peak_memory_mib=memory)


def _turns(contestants: Mapping[str, Contestant], settings: Settings) -> dict[str, Any]:
    """Lets the contestants step in turns, always from the same weights on the same rows."""
    ours, *peers = contestants
    start = [p.detach().clone() for p in contestants[ours].model.parameters()]

    def restore(name: str) -> None:
        with torch.no_grad():
            for parameter, value in zip(contestants[name].model.parameters(), start, strict=True):
                parameter.copy_(value)

    batches = settings.batches()
    losses, differences = {}, {}
    losses[ours], expected = contestants[ours].gradient(batches[0])
    for peer in peers:  # this is the warm-up too
        restore(peer)
        losses[peer], gradient = contestants[peer].gradient(batches[0])
        differences[peer] = {
            "loss": abs(losses[peer] / losses[ours] - 1),
            "gradient": ((gradient - expected).norm() / expected.norm()).item(),
        }
    result = interleave(
        {n: lambda i, c=c: c.step(batches[i]) for n, c in contestants.items()},
        settings.steps,
        settings.seed,
        prepare=restore,
    )
    restore(ours)
    medians = {n: times["wall"]["median"] for n, times in result["seconds"].items()}
    return result | {
        "pairs_per_second": {n: settings.batch_size / seconds for n, seconds in medians.items()},
        "loss": losses,
        "relative_difference": differences,
    }


def peak_memory(build: Builder, settings: Settings, mode: str) -> float:
    """Peak memory of set-up and some steps in a process of its own, in MiB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_steps_and_peak, build, settings, mode).result()


def _steps_and_peak(build: Builder, settings: Settings, mode: str) -> float:
    contestant = build(settings, mode)
    for batch in settings.batches()[:MEMORY_STEPS]:
        contestant.step(batch)
    return peak_mib()
