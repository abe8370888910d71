"""What a recipe needs of a device's memory: the estimate of ``prefopt check``.

The parts are counted in ``prefopt/models/memory.py``; here a recipe says what they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.training_args import OptimizerNames

from prefopt.data.tokenize import Ragged, Tokenized
from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.evaluation_recipe import NO_POLICY, judge_section, trains_with
from prefopt.models.load import load_config
from prefopt.models.memory import (
    Spread,
    cache_bytes,
    count,
    empty_model,
    logits_bytes,
    state_bytes,
    step_bytes,
    with_adapter,
)
from prefopt.recipe import EvalJudgeSection, JudgeSection, Recipe
from prefopt.trainers.base import disable_dropout
from prefopt.trainers.nash_mp import NashMPConfig
from prefopt.trainers.pair_rounds import PairRoundConfig
from prefopt.trainers.ppo import PPOConfig
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.sample_rounds import SampleRoundConfig

GIB = 2**30
RESERVE = 0.1  # of a device, for what is not counted: CUDA's context, gaps in the allocator, NCCL
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
# these share the device one after another; everything else is there all the time
IN_TURN = (
    ("activations", "logits"),
    ("sampling",),
    ("judge of evaluations",),
    ("start in evaluations",),
)


@dataclass(frozen=True)
class Machine:
    """What a run is meant for.

    Attributes:
        spread: Over devices.
        bf16: Whether it computes in bfloat16.
        device: ``cuda`` or ``cpu``.
        memory: Bytes of each device, or None where that is not known.
    """

    spread: Spread
    bf16: bool
    device: str
    memory: int | None


def memory_report(
    recipe: Recipe, args: Any, rows: Tokenized, lora: Any, machine: Machine
) -> dict[str, Any]:
    """The estimate and what follows from it.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        rows: The rows to train on.
        lora: PEFT's configuration of the adapter, or None.
        machine: Where it is to run.

    Returns:
        ``parts``, bytes a device by what takes them; ``total``; ``parameters`` of the policy;
        ``micro_batch_tokens`` of the largest micro-batch; ``fits`` and ``advice`` where the memory
        of a device is known; ``verdict``, one line; ``notes``, what could not be counted. Where the
        model's configuration cannot be had, or its step depends on values: ``problem``.
    """
    model = recipe.model
    try:
        config = load_config(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        parts, facts = _parts(recipe, args, rows, lora, machine, config)
    except PrefoptError as error:
        return {"problem": str(error)}
    except RuntimeError as error:  # how torch says that shapes depend on values
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"problem": f"the model's step cannot be followed without values ({reason})"}
    total = total_bytes(parts)
    report = {"parts": parts, "total": total, **facts}
    if machine.memory is not None:
        report["fits"] = total <= (1 - RESERVE) * machine.memory
        report["advice"] = [] if report["fits"] else advice(recipe, args, machine)
    report["verdict"] = verdict(report, machine)
    return report


def total_bytes(parts: Mapping[str, int]) -> int:
    """The most that is there at once."""
    in_turn = [sum(parts.get(name, 0) for name in group) for group in IN_TURN]
    named = {name for group in IN_TURN for name in group}
    return sum(size for name, size in parts.items() if name not in named) + max(in_turn)


def advice(recipe: Recipe, args: Any, machine: Machine) -> list[str]:
    """What would need less, the cheapest first, of what the recipe does not do yet."""
    alternatives = {
        "gradient_checkpointing": args.gradient_checkpointing,
        "a smaller per_device_train_batch_size": args.per_device_train_batch_size == 1,
        "LoRA": recipe.model.lora is not None,
        "quantization nf4": recipe.model.lora is None or recipe.model.quantization == "nf4",
        "FSDP2 or ZeRO-3 on more devices": machine.spread.gathers,
    }
    return [name for name, done in alternatives.items() if not done]


def verdict(report: Mapping[str, Any], machine: Machine) -> str:
    """One line: what it is, how it is spread, what it needs and, where that is known, of what."""
    spread = machine.spread
    trained = "adapter" if report["adapter"] else "optimiser"
    millions = report["parameters"] / 1e6
    name = f"{millions / 1e3:.1f}B" if millions >= 1e3 else f"{millions:.1f}M"
    what = f"policy {name} + {trained}"
    where = f"{NAMES[spread.strategy]} x {spread.processes}"
    if machine.memory is None:
        return f"{what}, {where}: {size(report['total'])} a device"
    found = f"{what}, {where}, {report['total'] / GIB:.0f} of {machine.memory / GIB:.0f} GiB"
    if report["fits"]:
        return f"fits: {found}"
    tries = f"; try {', '.join(report['advice'])}" if report["advice"] else ""
    return f"does not fit: {found}, of which {RESERVE:.0%} are left for what is not counted{tries}"


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def largest_micro_batch(rows: Tokenized, args: Any, recipe: Recipe) -> list[PromptTree]:
    """The micro-batch of the most tokens; ids are 0, and samples are as long as they may be."""
    columns = {name: c.lengths for name, c in vars(rows).items() if isinstance(c, Ragged)}
    prompts = columns.pop("prompt_ids")
    if "answer_ids" in columns:  # of a comparison both letters are read
        columns["other_ids"] = columns["answer_ids"]
    if isinstance(args, RoundConfig) and args.rows != "pairs":
        columns = {}  # offline answers are reset to, and not on the tree
    samples = np.full(len(prompts), recipe.rollout.max_new_tokens)
    answers = [*columns.values(), *[samples] * samples_on_a_tree(args, recipe)]
    order = np.argsort(-np.sum([prompts, *answers], axis=0), kind="stable")
    longest = order[: args.per_device_train_batch_size]
    if recipe.trainer.algorithm == "sft":  # rows are padded
        longest = np.repeat(order[:1], len(longest))
    return [
        PromptTree([0] * prompts[i], [[0] * lengths[i] for lengths in answers]) for i in longest
    ]


def samples_on_a_tree(args: Any, recipe: Recipe) -> int:
    """Fresh samples of a prompt that a step reads."""
    if isinstance(args, PairRoundConfig):
        return 2
    if not isinstance(args, SampleRoundConfig):
        return 0
    asked = recipe.rollout.samples_per_prompt
    return asked if args.samples_drawn(asked) else 0


def kept_copies(args: Any, recipe: Recipe) -> int:
    """Copies of the trained weights in memory beside the policy's (docs/on_policy.md, "Memory")."""
    if not isinstance(args, SampleRoundConfig) or not samples_on_a_tree(args, recipe):
        return 0
    if not isinstance(args, NashMPConfig):
        return 1
    if args.mode == "mirror_prox":
        return 3
    return 2 if args.prox and 0 < args.kappa < 1 else 1


def _parts(
    recipe: Recipe, args: Any, rows: Tokenized, lora: Any, machine: Machine, config: Any
) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes by what takes them, and the facts they follow from."""
    spread, bf16, quantization = machine.spread, machine.bf16, recipe.model.quantization
    dtype = _dtype(recipe.model.dtype, config)
    # what computes: gathered and dequantised layers are in bfloat16
    gathered = bf16 and spread.strategy != "ddp"
    computing = torch.bfloat16 if quantization or gathered else dtype
    classifier = recipe.trainer.algorithm == "reward_model"
    trees = largest_micro_batch(rows, args, recipe)
    step = _step_options(args, machine)
    state = {"lora": lora is not None, "optim": OptimizerNames(args.optim).value}
    model = _trained(empty_model(config, classifier=classifier, dtype=computing), args, lora)
    counts = count(model)
    parts = state_bytes(counts, spread, dtype=dtype, quantization=quantization, **state)
    trained = counts.trained * (4 if lora is not None else dtype.itemsize)
    parts["kept weights"] = _kept_bytes(args, recipe, counts.trained, trained, spread)
    activations = step_bytes(model, trees, **step) - step["keep_gradients"] * trained
    if isinstance(args, PPOConfig):
        critic = _trained(empty_model(config, classifier=True, dtype=torch.float32), args, lora)
        sizes = count(critic)
        own = state_bytes(sizes, Spread("ddp", spread.processes), dtype=torch.float32, **state)
        parts["critic"] = sum(own.values())
        activations += step_bytes(critic, trees, values=True, **step)
        activations -= step["keep_gradients"] * 4 * sizes.trained
    notes: list[str] = []
    parts |= _judges_bytes(recipe, args, machine, notes)
    plain = lora is None and spread.strategy == "ddp"
    if recipe.eval is not None and plain and recipe.trainer.algorithm not in (*NO_POLICY, "sft"):
        parts["start in evaluations"] = counts.total * dtype.itemsize  # for the KL from it
    tokens = sum(len(ids) for tree in trees for ids in tree.completions)
    vocabulary = 0 if classifier else config.get_text_config().vocab_size
    # the step was taken with the chunks of a CPU
    parts["activations"] = activations - logits_bytes(tokens, vocabulary, "cpu", bf16)
    parts["logits"] = logits_bytes(tokens, vocabulary, machine.device, bf16)
    if isinstance(args, RoundConfig):
        each = 2 if bf16 else dtype.itemsize
        parts |= _rollout_bytes(recipe, rows, machine, config, each)
        if "sampling" in parts and spread.gathers:  # the policy is whole while it samples
            parts["sampling"] += counts.total * each
    facts = {
        "parameters": counts.total,
        "trained": counts.trained,
        "adapter": lora is not None,
        "micro_batch_tokens": sum(tree.num_tokens for tree in trees),
        "notes": notes,
    }
    return parts, facts


def _step_options(args: Any, machine: Machine) -> dict[str, Any]:
    """How a step is taken; where gradients are spread, each leaves as soon as it is there."""
    sharded = machine.spread.strategy != "ddp"
    return {
        # TRL's rows, of SFT, hold one answer each
        "layout": "tree" if getattr(args, "layout", "separate") != "separate" else "separate",
        "bf16": machine.bf16,
        "checkpointing": args.gradient_checkpointing,
        "keep_gradients": not sharded,
        "micro_batches": 1 if sharded else min(2, args.gradient_accumulation_steps),
    }


def _trained(model: PreTrainedModel, args: Any, lora: Any) -> nn.Module:
    """A model as its trainer makes it."""
    if getattr(args, "disable_dropout", False):
        disable_dropout(model)
    return with_adapter(model, lora)


def _rollout_bytes(
    recipe: Recipe, rows: Tokenized, machine: Machine, config: PreTrainedConfig, each: int
) -> dict[str, int]:
    rollout = recipe.rollout
    if rollout.engine == "vllm_server":
        return {}
    if rollout.engine == "transformers":
        longest = int(rows.prompt_ids.lengths.max()) + rollout.max_new_tokens
        return {"sampling": cache_bytes(config, rollout.batch_size, longest, each)}
    return {"vLLM": round(rollout.gpu_memory * (machine.memory or 0))}  # auto may choose it


def _kept_bytes(args: Any, recipe: Recipe, count: int, trained: int, spread: Spread) -> int:
    """Copies of the trained weights; a moving target, and shards of any, are float32."""
    copies = kept_copies(args, recipe)
    moving = isinstance(args, NashMPConfig) and args.mode == "ema" and copies > 1
    size = 4 * count if moving or spread.strategy == "fsdp2" else trained
    return copies * size // (spread.processes if spread.gathers else 1)


def _judges_bytes(recipe: Recipe, args: Any, machine: Machine, notes: list[str]) -> dict[str, int]:
    """The judge that training asks, always there, and another that is while it evaluates."""
    judge, parts = recipe.judge, {}
    if judge is not None and getattr(args, "asks", None):
        vllm = judge.engine == "vllm"  # its share of the device
        share = round(judge.gpu_memory * (machine.memory or 0))
        parts["judge"] = share if vllm else _judge_bytes(judge, notes)
    if recipe.eval is not None and recipe.trainer.algorithm not in NO_POLICY:
        section = judge_section(recipe)
        if section.kind != "api" and not trains_with(recipe):
            parts["judge of evaluations"] = _judge_bytes(section, notes)
    return parts


def _judge_bytes(judge: JudgeSection | EvalJudgeSection, notes: list[str]) -> int:
    """A judge's weights, as they are loaded."""
    path = str(judge.path)
    try:
        config = load_config(path)
    except PrefoptError:
        notes.append(f"not counted: the judge, since {path} is not there yet")
        return 0
    dtype = _dtype(judge.dtype, config)
    classifier = judge.kind == "reward_model"
    model = empty_model(config, classifier=classifier, dtype=dtype)
    return count(model).total * dtype.itemsize


def _dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    if name == "auto":
        return config.dtype or torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
