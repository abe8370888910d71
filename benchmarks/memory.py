"""Peak memory of DPO steps on a CPU against the estimate of ``prefopt check``, in float32.

Each run is a process of its own: it notes what is resident once everything is imported and a step
has been made with a tiny model, builds the model, takes steps through prefopt's DPOTrainer, and
reads how far the high-water mark has risen. It runs twice: with glibc told to hand memory back at
once, which shows what is in use, and as it is, with the gaps that glibc keeps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import EOS, PAD, facts, find_in
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from training import Contestant, training_arguments
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.data.tree import PromptTree
from prefopt.models.memory import (
    Spread,
    count,
    empty_model,
    state_bytes,
    step_bytes,
    with_adapter,
)

MIB = 2**20
STEPS = 3


@dataclass(frozen=True)
class Run:
    """What is measured: the shape of the model, and how it is trained."""

    layers: int
    vocabulary: int
    lora: bool
    checkpointing: bool
    pairs: int
    hidden: int = 512

    @property
    def config(self) -> LlamaConfig:
        """The model's shape: untied head, no dropout."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=self.vocabulary,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )

    @property
    def adapter(self) -> LoraConfig | None:
        """On all linear layers but the head."""
        settings = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return LoraConfig(**settings) if self.lora else None

    @property
    def trees(self) -> list[PromptTree]:
        """Prompts of 160 tokens with answers of 96 and 64."""
        return [PromptTree([5] * 160, [[6] * 96, [7] * 64]) for _ in range(self.pairs)]


def estimate(run: Run) -> int:
    """What `prefopt check` would say, in bytes."""
    model = with_adapter(empty_model(run.config, dtype=torch.float32), run.adapter)
    state = state_bytes(count(model), Spread(), dtype=torch.float32, lora=run.lora)
    step = step_bytes(model, run.trees, checkpointing=run.checkpointing)
    return state["weights"] + state["optimiser"] + max(step, state["gradients"])


def measure(run: Run) -> int:
    """Steps of the real trainer; how far the high-water mark rises, in bytes."""
    _train(Run(layers=1, vocabulary=64, lora=run.lora, checkpointing=False, pairs=1, hidden=64))
    before = _status("VmRSS")
    _train(run)
    return _status("VmHWM") - before


def _train(run: Run) -> None:
    from prefopt.trainers.base import TreeDataset
    from prefopt.trainers.dpo import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    settings = argparse.Namespace(batch_size=run.pairs, scratch=None)
    extra = {"max_prompt_length": None, "gradient_checkpointing": run.checkpointing}
    args = DPOConfig(**training_arguments(settings, **extra))
    trainer = DPOTrainer(
        LlamaForCausalLM(run.config), args, TreeDataset(run.trees), peft_config=run.adapter
    )
    trainer.before_training(resumed=False)
    if run.checkpointing:
        trainer.model.gradient_checkpointing_enable()
    contestant = Contestant(trainer, [trainer.train_dataset[i] for i in range(run.pairs)])
    for _ in range(STEPS):
        contestant.step(range(run.pairs))


def _status(name: str) -> int:
    return int(find_in("/proc/self/status", rf"{name}:\s+(\d+)")) * 1024


def in_a_process(run: Run, **environment: str) -> int:
    with (
        patch.dict(os.environ, environment),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(measure, run).result()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", action="store_true", help="print the result as JSON, no table")
    options.add_argument("--size", choices=["base", "tiny"], default="base")
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = options.parse_args(argv)
    shapes = itertools.product((8,), (8192, 32000), (False, True), (False, True), (4,))
    if args.size == "tiny":
        shapes = [(2, 8192, True, False, 2)]
    runs = []
    for shape in shapes:
        run = Run(*shape)
        in_use = in_a_process(run, MALLOC_MMAP_THRESHOLD_="65536")
        as_it_is, expected = in_a_process(run), estimate(run)
        found = {
            "estimate_mib": expected / MIB,
            "in_use_mib": in_use / MIB,
            "with_gaps_mib": as_it_is / MIB,
            "ratio": expected / in_use,
        }
        runs.append(asdict(run) | found)
    result = {**facts("memory", args), "runs": runs}
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (args.output / "memory-cpu.json").write_text(text + "\n")
    print(text) if args.json else _print_table(runs)
    return result


def _print_table(runs: Sequence[dict[str, Any]]) -> None:
    titles = ("vocabulary", "trained", "checkpointing", "estimate MiB", "in use", "ratio")
    table = Table(*titles, "with glibc's gaps")
    for run in runs:
        table.add_row(
            f"{run['vocabulary']:,}",
            "LoRA" if run["lora"] else "all",
            "on" if run["checkpointing"] else "off",
            f"{run['estimate_mib']:.0f}",
            f"{run['in_use_mib']:.0f}",
            f"{run['ratio']:.2f}",
            f"{run['with_gaps_mib']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
