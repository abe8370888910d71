"""What the benchmarks share: model, rows, interleaved timing, peak memory and the result file."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig

from prefopt.data.tree import PromptTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD, EOS = 0, 1

# hidden, intermediate, layers, heads, key-value heads, vocabulary; tokens of prompts and completions
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "base": {"model": (512, 1408, 8, 8, 4, 8192), "prompt": (64, 384), "completion": (16, 256)},
    "tiny": {"model": (64, 128, 2, 4, 2, 256), "prompt": (8, 32), "completion": (4, 16)},
}
SIGMA, CORRELATION = 0.8, 0.5  # of log-lengths; about what public preference sets show


@dataclass(frozen=True)
class Settings:
    """What a benchmark runs on; a child process builds the same from it."""

    size: str
    batch_size: int
    steps: int
    seed: int
    scratch: str

    @property
    def config(self) -> LlamaConfig:
        """The model's shape: untied head, no dropout."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary = SIZES[self.size]["model"]
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            num_labels=1,
        )

    def rows(self) -> list[PromptTree]:
        """Pairs for every step; lengths are log-normal around the middle of the size's ranges."""
        draw = random.Random(self.seed)
        ranges = SIZES[self.size]
        shared, own = CORRELATION**0.5, (1 - CORRELATION) ** 0.5

        def length(bounds: tuple[int, ...], deviate: float) -> int:
            low, high = bounds
            return round(min(high, max(low, math.sqrt(low * high) * math.exp(SIGMA * deviate))))

        def ids(count: int) -> list[int]:
            return [draw.randrange(2, self.config.vocab_size) for _ in range(count)]

        rows = []
        for _ in range(self.batch_size * self.steps):
            prompt = ids(length(ranges["prompt"], draw.gauss()))
            common = shared * draw.gauss()
            sizes = [length(ranges["completion"], common + own * draw.gauss()) for _ in range(2)]
            rows.append(PromptTree(prompt, [[*ids(size - 1), EOS] for size in sizes]))
        return rows

    def batches(self) -> list[range]:
        """The indices of each step's rows."""
        size = self.batch_size
        return [range(step * size, (step + 1) * size) for step in range(self.steps)]

    def training_arguments(self, **extra: Any) -> dict[str, Any]:
        """What every trainer is told."""
        return {
            "output_dir": tempfile.mkdtemp(dir=self.scratch),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_checkpointing": False,
            "bf16": DEVICE == "cuda",
            "max_length": None,
            "dataloader_pin_memory": DEVICE == "cuda",
            "report_to": "none",
            **extra,
        }


@dataclass
class Contestant:
    """One way to train, stepped by hand so that several can take turns.

    Attributes:
        model: Its model.
        loss: Collates the rows with these indices and computes their loss.
    """

    model: nn.Module
    loss: Callable[[Sequence[int]], Tensor]

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

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


def perturb(model: nn.Module, seed: int) -> None:
    """Moves all weights by a tenth of their tensor's spread: the policy must not be the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(0.1 * parameter.std() * noise)


Builder = Callable[[Settings, str], Contestant]


def compare_training(
    name: str, builders: Mapping[str, Builder], modes: Sequence[str], argv: Sequence[str] | None
) -> dict[str, Any]:
    """The main program of a training benchmark.

    Args:
        name: Of the result file.
        builders: Makes each contestant from settings and mode; ours comes first.
        modes: The ways of training to compare them in.
        argv: The command line.
    """
    options = parser(f"Times and compares training steps: {', '.join(builders)}.", steps=10)
    options.add_argument("--batch-size", type=int, default=4, help="pairs a step")
    options.add_argument("--modes", choices=modes, nargs="+", default=modes)
    options.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    args = options.parse_args(argv)
    runs, memory = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(args.size, args.batch_size, args.steps, args.seed, scratch)
        for mode in args.modes:
            if not args.no_memory:
                memory[mode] = {
                    variant: _in_child(_peak_memory, build, settings, mode)
                    for variant, build in builders.items()
                }
            contestants = {variant: build(settings, mode) for variant, build in builders.items()}
            for threads in args.threads:
                torch.set_num_threads(threads)
                runs.append({"mode": mode, "threads": threads} | _turns(contestants, settings))
    return report(name, args, settings, runs=runs, peak_memory_mib=memory)


def _turns(contestants: Mapping[str, Contestant], settings: Settings) -> dict[str, Any]:
    """Lets the contestants step in turns, always from the same weights on the same rows."""
    ours, *peers = contestants
    start = [p.detach().clone() for p in contestants[ours].model.parameters()]

    def restore(variant: str) -> None:
        with torch.no_grad():
            for parameter, value in zip(contestants[variant].model.parameters(), start, strict=True):
                parameter.copy_(value)

    batches = settings.batches()
    losses, agreement = {}, {}
    losses[ours], expected = contestants[ours].gradient(batches[0])
    for peer in peers:  # this is the warm-up too
        restore(peer)
        losses[peer], gradient = contestants[peer].gradient(batches[0])
        agreement[peer] = {
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
        "relative_difference": agreement,
    }


def interleave(
    runs: Mapping[str, Callable[[int], object]],
    rounds: int,
    seed: int,
    prepare: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Times every function once a round, in random order.

    Args:
        runs: The functions, ours first; each gets the number of the round.
        rounds: How often.
        seed: Of the order.
        prepare: Called with the function's name before each timed call.

    Returns:
        ``seconds`` of each function, and ``times_faster``: peer over ours within the same round.
        Both are medians and quartiles of wall and of CPU time.
    """
    order = random.Random(seed)
    samples: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in runs}
    for i in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            prepare(name)
            gc.collect()
            _synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name](i)
            _synchronise()
            samples[name]["wall"].append(time.perf_counter() - wall)
            samples[name]["cpu"].append(time.process_time() - cpu)
    ours, *peers = runs
    return {
        "seconds": {n: {c: _spread(v) for c, v in clocks.items()} for n, clocks in samples.items()},
        "times_faster": {
            peer: {
                clock: _spread([a / b for a, b in zip(values, samples[ours][clock], strict=True)])
                for clock, values in samples[peer].items()
            }
            for peer in peers
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return dict(zip(("low", "median", "high"), quartiles, strict=True))


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _in_child(function: Callable[..., Any], *args: object) -> Any:
    """The function's value, computed in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _peak_memory(build: Builder, settings: Settings, mode: str) -> float:
    """Peak memory of this process (on CUDA: of the device) over set-up and all steps, in MiB."""
    contestant = build(settings, mode)
    for batch in settings.batches():
        contestant.step(batch)
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # ru_maxrss would include what the parent held when it started this process
    return _find(r"VmHWM:\s+(\d+)", "/proc/self/status", float) / 1024


def _find(pattern: str, path: str, kind: Callable[[str], Any] = str) -> Any:
    found = re.search(pattern, Path(path).read_text())
    return kind(found[1]) if found else None


def parser(description: str, steps: int) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print the result as JSON, no table")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    options.add_argument("--steps", type=int, default=steps, help="timed rounds, at least 2")
    options.add_argument("--size", choices=SIZES, default="base", help="of the model and the rows")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return options


def report(
    name: str, args: argparse.Namespace, settings: Settings, *, runs: list[dict], **parts: Any
) -> dict[str, Any]:
    """Writes the result file, prints a table or JSON, and returns the result."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    commit, changes = (
        subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "cpu": f"{_find(r'model name.*: (.*)', '/proc/cpuinfo')}, {os.cpu_count()} cores",
        "load_average": os.getloadavg(),
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "accelerate")}
        | {"python": platform.python_version()},
        "commit": commit + ("+changes" if changes else ""),
        "settings": asdict(settings) | SIZES[settings.size],
        "runs": runs,
        **parts,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (args.output / f"{name}-{DEVICE}.json").write_text(text + "\n")
    if args.json:
        print(text)
    else:
        _print_table(result)
    return result


def _print_table(result: Mapping[str, Any]) -> None:
    table = Table("run", "", "s (quartiles)", "CPU s", "ours is faster by", "peak MiB")
    for run in result["runs"]:
        label = f"{run['mode']}, {run['threads']} threads"
        memory = result.get("peak_memory_mib", {}).get(run["mode"], {})
        for name, times in run["seconds"].items():
            wall, ratio = times["wall"], run["times_faster"].get(name)
            table.add_row(
                label,
                name,
                f"{wall['median']:.3f} ({wall['low']:.3f} to {wall['high']:.3f})",
                f"{times['cpu']['median']:.3f}",
                f"{ratio['wall']['median']:.2f} (CPU {ratio['cpu']['median']:.2f})" if ratio else "",
                f"{memory[name]:.0f}" if memory else "",
            )
            label = ""
    Console().print(table)
