"""What the benchmarks share: the model and its rows, interleaved timing, and the result file."""

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
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from prefopt.data.tree import PromptTree

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAD, EOS = 0, 1

# hidden, intermediate, layers, heads, key-value heads, vocabulary
MODELS = {"base": (512, 1408, 8, 8, 4, 8192), "tiny": (64, 128, 2, 4, 2, 256)}
# fewest and most tokens of a prompt and of a completion
RANGES = {"base": ((64, 384), (16, 256)), "tiny": ((8, 32), (4, 16))}
SIGMA, CORRELATION = 0.8, 0.5  # of log-lengths, about as in public preference sets


@dataclass(frozen=True)
class Settings:
    """What a benchmark runs on; a child process builds the same from it."""

    size: str
    batch_size: int
    steps: int
    seed: int
    scratch: str = ""  # a folder for what trainers write

    @property
    def config(self) -> PreTrainedConfig:
        """The model's shape: untied head, no dropout."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary = MODELS[self.size]
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

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Fewest and most tokens of a prompt and of a completion."""
        return RANGES[self.size]

    def rows(self) -> list[PromptTree]:
        """Pairs for all steps; lengths are log-normal around the middle of the size's ranges."""
        draw = random.Random(self.seed)
        prompts, completions = self.ranges
        shared, own = CORRELATION**0.5, (1 - CORRELATION) ** 0.5
        vocabulary = self.config.vocab_size

        def length(bounds: tuple[int, int], deviate: float) -> int:
            low, high = bounds
            return round(min(high, max(low, math.sqrt(low * high) * math.exp(SIGMA * deviate))))

        def ids(count: int) -> list[int]:
            return [draw.randrange(2, vocabulary) for _ in range(count)]

        rows = []
        for _ in range(self.batch_size * self.steps):
            prompt, pair = ids(length(prompts, draw.gauss())), shared * draw.gauss()
            sizes = [length(completions, pair + own * draw.gauss()) for _ in range(2)]
            rows.append(PromptTree(prompt, [[*ids(size - 1), EOS] for size in sizes]))
        return rows

    def batches(self) -> list[range]:
        """The indices of each step's rows."""
        size = self.batch_size
        return [range(step * size, (step + 1) * size) for step in range(self.steps)]


def parser(description: str) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", action="store_true", help="print the result as JSON, no table")
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    options.add_argument("--steps", type=int, default=10, help="timed rounds, at least 2")
    options.add_argument("--size", choices=MODELS, default="base", help="of model and rows")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    return options


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


def peak_mib() -> float:
    """The most memory this process has held: of its GPU, or resident, in MiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # ru_maxrss would count what the parent held when it started this process
    return int(find_in("/proc/self/status", r"VmHWM:\s+(\d+)")) / 1024


def find_in(path: str, pattern: str) -> str:
    """The first group of the pattern's first match in a file, or an empty string."""
    found = re.search(pattern, Path(path).read_text())
    return found[1] if found else ""


def facts(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every result begins with: the machine, the versions, the options."""
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]
    commit, changes = (
        subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    return {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "cpu": f"{find_in('/proc/cpuinfo', 'model name.*: (.*)')}, {os.cpu_count()} cores",
        "load_average": os.getloadavg(),
        "versions": {p: _version(p) for p in ("torch", "transformers", "trl", "accelerate")}
        | {"python": platform.python_version()},
        "commit": commit + ("+changes" if changes else ""),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def report(
    name: str, args: argparse.Namespace, settings: Settings, *, runs: list[dict], **parts: Any
) -> dict[str, Any]:
    """Writes the result file, prints a table or JSON, and returns the result."""
    result = {
        **facts(name, args),
        "model": settings.config.to_diff_dict() | {"head_share": _head_share(settings.config)},
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


def _head_share(config: LlamaConfig) -> float:
    """The head's share of a forward pass's matrix products, were it to score every position."""
    with torch.device("meta"):
        modules = LlamaForCausalLM(config).named_modules()
    sizes = {name: m.weight.numel() for name, m in modules if isinstance(m, nn.Linear)}
    return sizes["lm_head"] / sum(sizes.values())


def _print_table(result: Mapping[str, Any]) -> None:
    table = Table("run", "", "seconds", "CPU s", "ours is faster", "by CPU time", "peak MiB")
    for run in result["runs"]:
        label = f"{run['mode']}, threads: {run['threads']}"
        memory = result.get("peak_memory_mib", {}).get(run["mode"], {})
        for name, times in run["seconds"].items():
            ratio = run["times_faster"].get(name)
            table.add_row(
                label,
                name,
                *(f"{times[clock]['median']:.3f}" for clock in ("wall", "cpu")),
                *(f"{ratio[c]['median']:.2f} x" if ratio else "" for c in ("wall", "cpu")),
                f"{memory[name]:.0f}" if memory else "",
            )
            label = ""
        table.add_section()
    Console().print(table)
