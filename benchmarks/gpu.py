"""What a GPU makes of prefopt: DPO steps of real shapes, and the attention of trees by itself.

Everything is random but real in shape, in bfloat16. The parts run one after another for as long as
the time lasts, the most telling first, and the result file is written anew after each.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dpo import STORED, prefopt, trl
from measure import DEVICE, EOS, PAD, Settings, facts, peak_mib
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from training import Contestant
from transformers import PreTrainedConfig, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefopt.data.tree import PromptTree, Segment, TreeBatch, collate_trees
from prefopt.models.attention import TreeMap, tree_attention

# hidden, intermediate, layers, heads, key-value heads, vocabulary; the heads are tied
SHAPES = {
    "0.5B": (896, 4864, 24, 14, 2, 151936),  # of Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (64, 128, 2, 4, 2, 512),
}
PAIRS = {"0.5B": 8, "1.5B": 4, "tiny": 2}  # a step
RANGES = {"tiny": ((8, 32), (4, 16))}
LONG = ((128, 1024), (64, 768))
STEPS, WARM_UP = 8, 2

Result = dict[str, Any]


@dataclass(frozen=True)
class QwenSettings(Settings):
    """Settings for the shapes of Qwen2.5."""

    @property
    def config(self) -> PreTrainedConfig:
        """The model's shape, with a tied head."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[self.size]
        return Qwen2Config(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Fewest and most tokens of a prompt and of a completion."""
        return RANGES.get(self.size, LONG)


def settings_of(size: str, scratch: str = "") -> QwenSettings:
    return QwenSettings(size, PAIRS[size], WARM_UP + STEPS, seed=0, scratch=scratch)


def seconds(function: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after some to warm up."""
    times = []
    for i in range(repeats + max(1, repeats // 10)):
        _synchronise()
        begun = time.perf_counter()
        function()
        _synchronise()
        if i >= max(1, repeats // 10):
            times.append(time.perf_counter() - begun)
    return median(times)


def matmul(size: int) -> Result:
    """What the device achieves: TFLOP/s of one large matrix product in bfloat16."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    taken = seconds(lambda: a @ b, 20)
    return {"size": size, "tflops": 2 * size**3 / taken / 1e12}


# --- training ------------------------------------------------------------------------------------


def on_trees(settings: Settings) -> Contestant:
    return prefopt(settings, STORED)


def on_rows(settings: Settings) -> Contestant:
    """A completion a row; the mask of padding keeps SDPA from its flash kernel."""
    contestant = prefopt(settings, STORED)
    contestant.trainer.layout = "separate"
    return contestant


def on_rows_without_mask(settings: Settings) -> Contestant:
    """A completion a row without a mask, so that SDPA takes its flash kernel.

    Padding stands on the right, where nothing real sees it.
    """

    def unmask(batch: dict[str, Any]) -> None:
        batch["trees"] = replace(batch["trees"], attention_mask=None)

    contestant = on_rows(settings)
    contestant.before_loss = unmask
    return contestant


WAYS: dict[str, Callable[[Settings], Contestant]] = {
    "trees": on_trees,
    "rows, flash": on_rows_without_mask,
    "rows, mask": on_rows,
    "trl": lambda settings: trl(settings, STORED),
}


def training(size: str, way: str, achieved: float) -> Result:
    """DPO steps of one model in one way: their speed, share of the matrix product, and memory.

    Tokens are those of the data, prompts once: the same number in all ways. FLOPs are those the
    way has to spend, its second copies of prompts and its padding included.
    """
    if way == "trl" and find_spec("trl") is None:
        return {"skipped": "trl is not installed"}
    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(size, scratch)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        contestant = WAYS[way](settings)
        batches = settings.batches()
        loss = contestant.loss(batches[0]).item()
        times = []
        for batch in batches:
            _synchronise()
            begun = time.perf_counter()
            contestant.step(batch)
            _synchronise()
            times.append(time.perf_counter() - begun)
    taken = median(times[WARM_UP:])
    rows = settings.rows()[WARM_UP * settings.batch_size :]
    batches = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
    flops = sum(step_flops(size, batch, way) for batch in batches)
    tokens = sum(tree.num_tokens for tree in rows)
    return {
        "seconds_a_step": taken,
        "tokens_a_second": tokens / sum(times[WARM_UP:]),
        "pairs_a_second": len(rows) / sum(times[WARM_UP:]),
        "tflops": (rate := flops / sum(times[WARM_UP:]) / 1e12),
        "mfu": rate / achieved,
        "peak_mib": peak_mib(),
        "loss": loss,
    }


def step_flops(size: str, trees: Sequence[PromptTree], way: str) -> float:
    """FLOPs of a forward and a backward pass over a batch, with the head's second forward.

    A product of a weight and a position takes 2 FLOPs forward and 4 backward; scores and weighted
    sums of causal attention are counted for the pairs that see each other.
    """
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[size]
    keys = kv_heads * hidden // heads
    block = 2 * hidden * (hidden + keys) + 3 * hidden * intermediate
    layout = "tree" if way == "trees" else "separate"
    batch = collate_trees(trees, layout=layout)
    segments = batch.segments or [
        Segment(0, batch.input_ids.shape[1], 0, 0) for _ in batch.input_ids
    ]
    seen = sum(s.length * s.prefix_length + s.length * (s.length + 1) // 2 for s in segments)
    backbone = 6 * layers * (block * batch.input_ids.numel() + 2 * hidden * seen)
    return backbone + 8 * hidden * vocabulary * len(batch.targets)


# --- attention -----------------------------------------------------------------------------------


def attention(size: str) -> Result:
    """One layer's attention over a batch of trees, forward and backward, in three ways."""
    config = settings_of(size).config
    trees = settings_of(size).rows()[: PAIRS[size]]
    batch = collate_trees(trees).to(DEVICE)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim, positions = config.hidden_size // heads, batch.input_ids.numel()
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    query, key, value = (
        torch.randn(1, n, positions, dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(1, positions, heads, dim, device=DEVICE, dtype=dtype)
    ways: dict[str, Callable[[], Tensor]] = {
        "trees, variable length": partial(with_kernel, query, key, value, TreeMap(batch)),
    }
    if DEVICE == "cuda":  # FlexAttention has no backward pass on a CPU
        mask = create_block_mask(visible(batch), None, None, positions, positions, device=DEVICE)
        ways["trees, FlexAttention"] = partial(with_blocks, query, key, value, mask)
    outputs = {way: run().detach().float() for way, run in ways.items()}
    expected = outputs["trees, variable length"]

    def backward(run: Callable[[], Tensor]) -> None:
        torch.autograd.grad(run(), (query, key, value), upstream)

    return {
        "positions": positions,
        "heads": [heads, kv_heads, dim],
        "seconds": {way: seconds(partial(backward, run), 20) for way, run in ways.items()}
        | {"rows, flash": seconds(padded_rows(trees, heads, kv_heads, dim, dtype), 20)},
        "relative_difference": {
            way: ((out - expected).norm() / expected.norm()).item() for way, out in outputs.items()
        },
    }


def with_kernel(query: Tensor, key: Tensor, value: Tensor, tree_map: TreeMap) -> Tensor:
    """prefopt's own: on CUDA one variable-length flash call with gathered keys."""
    return tree_attention(torch.nn.Module(), query, key, value, None, tree_map=tree_map)[0]


_flex = torch.compile(flex_attention, dynamic=False)


def with_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """FlexAttention, which leaves out blocks where nothing is seen."""
    return _flex(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)


def visible(batch: TreeBatch) -> Callable[..., Tensor]:
    """Which key a query sees: those before it in its own segment and in its prefix."""
    own = torch.zeros(batch.input_ids.numel(), dtype=torch.long)
    prefix = torch.zeros_like(own)
    at = {segment.start: number for number, segment in enumerate(batch.segments)}
    for number, s in enumerate(batch.segments):
        own[s.start : s.start + s.length] = number
        prefix[s.start : s.start + s.length] = at[s.prefix_start]
    own, prefix = own.to(DEVICE), prefix.to(DEVICE)

    def see(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (own[key] == own[query]) | (own[key] == prefix[query])
        return (key <= query) & related

    return see


def padded_rows(
    trees: Sequence[PromptTree], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> Callable[[], None]:
    """The same by SDPA over a row for each completion, as long as the longest."""
    rows, width = collate_trees(trees, layout="separate").input_ids.shape
    query, key, value = (
        torch.randn(rows, n, width, dim, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads

    def run() -> None:
        out, _ = sdpa_attention_forward(module, query, key, value, None, is_causal=True)
        torch.autograd.grad(out, (query, key, value), torch.ones_like(out))

    return run


# --- the program ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> Result:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="one tiny model: shows that it runs")
    options.add_argument("--budget", type=float, default=360, help="begin no part after, seconds")
    options.add_argument("--json", action="store_true", help="print the result")
    options.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = options.parse_args(argv)
    if args.device != DEVICE:
        options.error(f"found the device {DEVICE}: --device {DEVICE}, or hide the GPU from CUDA")
    begun = time.perf_counter()
    result = facts("gpu", args)
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = args.output / f"{'gpu-' if DEVICE == 'cpu' else ''}{slug}.json"
    args.output.mkdir(parents=True, exist_ok=True)
    result["matmul"] = matmul(256 if args.tiny else 8192)
    sizes = ["tiny"] if args.tiny else ["0.5B", "1.5B"]
    for name, part in parts(sizes, result["matmul"]["tflops"]).items():
        elapsed = time.perf_counter() - begun
        result[name] = part() if elapsed < args.budget else {"skipped": "out of time"}
        gc.collect()
        torch.cuda.empty_cache()
        path.write_text(json.dumps(result, indent=1) + "\n")
        if not args.json:
            print(f"{time.perf_counter() - begun:4.0f} s  {name}: {json.dumps(result[name])}")
    if args.json:
        print(path.read_text())
    return result


def parts(sizes: Sequence[str], achieved: float) -> dict[str, Callable[[], Result]]:
    """The parts in the order they are run, by name."""
    found: dict[str, Callable[[], Result]] = {}
    for size in sizes:
        found |= {
            f"dpo {size}, {way}": partial(within_memory, partial(training, size, way, achieved))
            for way in WAYS
        }
    return found | {f"attention {size}": partial(attention, size) for size in sizes}


def within_memory(part: Callable[[], Result]) -> Result:
    """The part's result, or that the device is too small for it."""
    try:
        return part()
    except torch.OutOfMemoryError as error:
        return {"skipped": f"out of memory: {error}".partition("\n")[0]}


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
