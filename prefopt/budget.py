"""What a recipe will take: steps, tokens, disk and, where a device is there to measure, time.

The time is an order of magnitude. It counts 2 floating-point operations a parameter and token read
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and divides by what a large matrix product
reaches on this device, of which training is taken to reach `UTILISATION` and sampling, which waits
for memory, `SAMPLING_UTILISATION`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt.data.findings import Findings
from prefopt.data.token_findings import answer_columns
from prefopt.data.tokenize import Tokenized
from prefopt.disk import free_space
from prefopt.memory import Machine, samples_on_a_tree, size
from prefopt.objectives.pair import needs_reference
from prefopt.recipe import Recipe
from prefopt.trainers.dpo import DPOConfig
from prefopt.trainers.round_config import RoundConfig

UTILISATION = 0.4  # of a matrix product's throughput, in training and scoring
SAMPLING_UTILISATION = 0.1
BYTES_A_SAMPLED_TOKEN = 12  # on disk: its id and its text
NO_DEVICE = "no device to measure on"


@dataclass(frozen=True)
class Plan:
    """How much a run does, at most.

    Attributes:
        steps: Optimiser steps.
        rows: Rows trained on, all passes together.
        rounds: Prompts of each round; empty for an algorithm without rounds.
        samples: Drawn for a prompt.
    """

    steps: int
    rows: int
    rounds: Sequence[int]
    samples: int


def plan_of(
    recipe: Recipe, args: Any, num_rows: int, rounds: Sequence[int], processes: int
) -> Plan:
    """Counts steps as the trainers do.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        num_rows: Rows to train on.
        rounds: Prompts of each round.
        processes: Devices.
    """
    accumulation = args.gradient_accumulation_steps
    micro = args.per_device_train_batch_size * processes
    if not isinstance(args, RoundConfig):
        batches = num_rows // micro if args.dataloader_drop_last else math.ceil(num_rows / micro)
        an_epoch = max(math.ceil(batches / accumulation), 1)
        steps = math.ceil(args.num_train_epochs * an_epoch)
        steps = args.max_steps if args.max_steps > 0 else steps
        return Plan(
            steps, min(steps * micro * accumulation, _rows(steps, an_epoch, num_rows)), (), 0
        )
    samples = args.samples_drawn(recipe.rollout.samples_per_prompt)
    rows = args.rows_planned(rounds, recipe.rollout.samples_per_prompt)
    passes = [math.ceil(n * args.num_train_epochs) for n in rows]
    steps = sum(math.ceil(n / (micro * accumulation)) for n in passes)
    steps = min(steps, args.max_steps) if args.max_steps > 0 else steps
    return Plan(steps, min(sum(passes), steps * micro * accumulation), rounds, samples)


def _rows(steps: int, an_epoch: int, num_rows: int) -> int:
    return math.ceil(steps / an_epoch * num_rows)


def budget(
    recipe: Recipe,
    args: Any,
    rows: Tokenized,
    plan: Plan,
    memory: Mapping[str, Any],
    machine: Machine,
    answers: int,
) -> dict[str, Any]:
    """What a run takes, if it does not end early.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        rows: Rows to train on.
        plan: How much is done.
        memory: From :func:`prefopt.memory.memory_report`.
        machine: Where it is to run.
        answers: That evaluations ask for.

    Returns:
        ``steps``; ``tokens``: ``trained``, ``scored`` by frozen models and ``generated``, at most;
        where the model could be counted also ``disk`` (bytes, at most), ``free`` (bytes there now)
        and ``flops``; ``seconds``, by ``throughput`` (operations a second of a matrix product) of
        ``device``, or ``seconds`` None and ``time``, why not; ``assumptions``, in words.
    """
    longest = recipe.rollout.max_new_tokens
    row_tokens = _tokens_of_a_row(recipe, args, rows)
    drawn = sum(plan.rounds) * plan.samples
    sampled = drawn * (float(rows.prompt_ids.lengths.mean()) + longest)
    readers = 1 + bool(getattr(args, "asks", None))  # the reference, and the judge
    tokens = {
        "trained": round(plan.rows * row_tokens),
        "scored": round(readers * sampled) + _reference_tokens(args, rows),
        "generated": drawn * longest + answers * _evaluation_tokens(recipe),
    }
    result: dict[str, Any] = {"steps": plan.steps, "tokens": tokens}
    if "parameters" not in memory:
        return result | {"seconds": None, "time": "the model could not be counted"}
    flops = _flops(args, memory, tokens)
    result["disk"] = _disk(recipe, args, plan, memory, tokens, machine)
    result["free"] = free_space(Path(recipe.run_dir))
    result["flops"] = flops
    result["assumptions"] = (
        f"{_per_token(args, memory)} operations a parameter and trained token, 2 a token read or "
        f"generated; training at {UTILISATION:.0%} and sampling at {SAMPLING_UTILISATION:.0%} of a "
        "matrix product's throughput; samples as long as they may be; judges as large as the policy"
    )
    if machine.device == "cuda" and not torch.cuda.is_available():
        return result | {"seconds": None, "time": NO_DEVICE}
    throughput = measured_throughput(machine)
    rate = throughput * machine.spread.processes
    training = (flops["trained"] + flops["scored"]) / (rate * UTILISATION)
    result["seconds"] = training + flops["generated"] / (rate * SAMPLING_UTILISATION)
    return result | {"throughput": throughput, "device": machine.device}


def measured_throughput(machine: Machine) -> float:
    """Floating-point operations a second of a square matrix product on this device."""
    device = machine.device
    n, dtype = (
        (8192, torch.bfloat16) if device == "cuda" and machine.bf16 else (1024, torch.float32)
    )
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best = math.inf
    for _ in range(4):
        begun = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def look_at_disk(budget: Mapping[str, Any], run_dir: str, findings: Findings) -> None:
    """Compares what a run writes at most with what is free."""
    if "disk" in budget and budget["disk"] > budget["free"]:
        found = f"{run_dir} takes {size(budget['disk'])} at most, {size(budget['free'])} are free"
        findings.add("disk", found)


def _tokens_of_a_row(recipe: Recipe, args: Any, rows: Tokenized) -> float:
    """Tokens of one row of a batch, on average and with samples as long as they may be."""
    fresh = samples_on_a_tree(args, recipe)
    offline = not isinstance(args, RoundConfig) or args.rows == "pairs"
    answers = [column for _, column in answer_columns(rows)] if offline else []
    copies = len(answers) + fresh if getattr(args, "layout", "separate") == "separate" else 1
    total = max(copies, 1) * rows.prompt_ids.lengths + fresh * recipe.rollout.max_new_tokens
    return float(np.mean(total + sum(column.lengths for column in answers)))


def _reference_tokens(args: Any, rows: Tokenized) -> int:
    """Tokens that the reference reads once, before training."""
    if not isinstance(args, DPOConfig) or not needs_reference(args.loss_type):
        return 0
    answers = [column.lengths for _, column in answer_columns(rows)]
    return int(np.sum(rows.prompt_ids.lengths) + sum(map(np.sum, answers)))


def _evaluation_tokens(recipe: Recipe) -> int:
    if recipe.eval is None:
        return 0
    return recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens


def _per_token(args: Any, memory: Mapping[str, Any]) -> int:
    """Operations a parameter and token: forward 2, to the inputs 2, to the weights 2, again 2."""
    return 4 + 2 * (not memory["adapter"]) + 2 * bool(args.gradient_checkpointing)


def _flops(args: Any, memory: Mapping[str, Any], tokens: Mapping[str, int]) -> dict[str, float]:
    each = {"trained": _per_token(args, memory), "scored": 2, "generated": 2}
    return {name: float(each[name] * memory["parameters"] * n) for name, n in tokens.items()}


def _disk(
    recipe: Recipe,
    args: Any,
    plan: Plan,
    memory: Mapping[str, Any],
    tokens: Mapping[str, int],
    machine: Machine,
) -> int:
    """Bytes at most: checkpoints and the one being written, weights kept, samples, ``final/``."""
    adapter = memory["adapter"]
    width = {"bfloat16": 2, "float16": 2}.get(recipe.model.dtype, 4)
    trained = memory["trained"] * (4 if adapter else width)
    spread = machine.spread
    shards = spread.processes if spread.strategy != "ddp" else 1
    checkpoint = trained + memory["parts"]["optimiser"] * shards
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(plan.steps * args.save_steps)
    saves = {"no": 0, "epoch": len(plan.rounds) or math.ceil(args.num_train_epochs)}.get(
        strategy, math.ceil(plan.steps / max(every, 1))
    )
    kept = saves if args.save_total_limit is None else min(saves, args.save_total_limit + 1)
    final = memory["parameters"] * width + (trained if adapter else 0)
    weights = trained if plan.rounds else 0  # those that the run began with
    return round(kept * checkpoint + final + weights + BYTES_A_SAMPLED_TOKEN * tokens["generated"])
