"""What of a run comes out the same when it is run again, as sentences made of the run's own facts.

docs/determinism.md says the same of all runs, with reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefopt.recipe import Recipe
from prefopt.trainers import TRAINERS
from prefopt.trainers.round_config import RoundConfig


@dataclass(frozen=True)
class Circumstances:
    """What decides whether a run comes out the same.

    Attributes:
        device: What it trains on, as ``environment.json`` calls it.
        cuda: Whether that is a CUDA device.
        threads: Of PyTorch, in a process.
        processes: That train together.
        half: Whether training computes in bfloat16 or float16.
        told: Whether PyTorch was told to use deterministic algorithms.
        engine: What samples; None where nothing does.
        api: Whether an API judges evaluations.
    """

    device: str
    cuda: bool = False
    threads: int = 1
    processes: int = 1
    half: bool = False
    told: bool = False
    engine: str | None = None
    api: bool = False


def circumstances(recipe: Recipe, environment: dict[str, Any], processes: int) -> Circumstances:
    """Reads them off a recipe and what ``environment.json`` says of the machine."""
    config = TRAINERS.get(recipe.trainer.algorithm, (None,))[0]
    samples = config is not None and issubclass(config, RoundConfig)
    options = recipe.trainer.options
    cuda = environment["devices"] > 0 and not options.get("use_cpu")
    judge = None if recipe.eval is None else recipe.eval.judge
    by_default = cuda and torch.cuda.is_bf16_supported() and not options.get("fp16")
    return Circumstances(
        device=environment["device"],
        cuda=cuda,
        threads=environment["threads"],
        processes=processes,
        half=bool(options.get("fp16") or options.get("bf16", by_default)),
        told=bool(options.get("full_determinism")),
        engine=recipe.rollout.engine if samples else None,
        api=judge is not None and judge.kind == "api",
    )


def determinism(run: Circumstances) -> list[str]:
    """What is and what is not deterministic in a run, a sentence each."""
    sentences = [
        "Order of data, masks of dropout, plans of rounds and noise of samples follow from the "
        "seed; the number of data workers, the order of keys in the recipe and Python's hash seed "
        "change nothing."
    ]
    sentences += _on_gpu(run) if run.cuda else _on_cpu(run)
    if run.processes > 1:
        sentences.append(
            f"{run.processes} processes add up gradients in an order of their own: compare with "
            f"runs of {run.processes} processes."
        )
    if run.half:
        sentences.append(
            "In half precision a difference of rounding is a thousand times that of float32, and "
            "may turn a sampled token."
        )
    if run.engine in ("vllm", "vllm_server", "auto"):
        sentences.append(
            "vLLM draws every sample with a seed of its own, but rounds log-probs by what shares "
            "its batch, which depends on timing: a sample may come out otherwise. Samples on disk "
            "are never drawn again."
        )
    if run.api:
        sentences.append(
            "An API may judge otherwise when it is asked again; what it said is kept in the run "
            "folder, and asked for once."
        )
    return sentences


def _on_cpu(run: Circumstances) -> list[str]:
    return [
        f"On this processor ({run.device}) the same recipe, data, versions and {run.threads} "
        "thread(s) give the same weights, bit for bit, killed and resumed runs included.",
        "Another number of threads, or another processor, may round sums differently.",
    ]


def _on_gpu(run: Circumstances) -> list[str]:
    if run.told:
        return [
            f"On {run.device} PyTorch was told to use deterministic algorithms "
            "(trainer.full_determinism): the same card, driver and versions give the same weights "
            "where every kernel has such an algorithm; PyTorch stops at one that has none.",
            "Another kind of card, or another batch size, rounds differently.",
        ]
    return [
        f"On {run.device} the same recipe may give weights that differ by rounding: kernels such "
        "as the backward passes of attention and of embeddings add with atomic operations, in an "
        "order that timing decides.",
        "trainer.full_determinism: true has PyTorch use deterministic algorithms, at some cost of "
        "speed.",
    ]
