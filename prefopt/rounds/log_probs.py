"""Log-probs and values of frozen models over a data set, computed once, in shards on disk.

The folder's name is a key over all the numbers depend on, so stored values are never reused for
other weights, other rows or another precision. A pass that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedConfig

from prefopt.data.tree import Layout, PromptTree, TreeBatch, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.gathered import whole_tensor
from prefopt.rounds.sums import damaged, read_summed, set_aside, write_summed

ANEW = "delete this file and run the same command again to compute them anew"


@dataclass(frozen=True)
class LogProbShards:
    """The stored numbers of a list of trees, ``trees_per_shard`` trees a file.

    Attributes:
        folder: Where the shards lie.
        sizes: How many numbers each tree has: one a completion, or one a completion token.
        trees_per_shard: Trees in each shard but the last.
    """

    folder: Path
    sizes: Sequence[int]
    trees_per_shard: int = 256

    @property
    def count(self) -> int:
        """How many shards there are."""
        return -(-len(self.sizes) // self.trees_per_shard)

    def missing(self) -> list[int]:
        """The shards that are not on disk yet."""
        return [shard for shard in range(self.count) if not self._path(shard).exists()]

    def are_whole(self) -> bool:
        """Whether all shards are on disk as they were written."""
        return not self.missing() and not damaged(map(self._path, range(self.count)))

    def set_aside_damaged(self) -> None:
        """Takes damaged shards out of the way, to be computed again; one process calls this."""
        set_aside(damaged(map(self._path, range(self.count))))

    def trees_in(self, shard: int) -> range:
        """The indices of a shard's trees."""
        start = shard * self.trees_per_shard
        return range(start, min(start + self.trees_per_shard, len(self.sizes)))

    def write(self, shard: int, values: Tensor) -> None:
        """Stores a shard's numbers, float32 [sum of its trees' sizes], all at once or not."""
        write_summed(self._path(shard), save({"log_probs": values.float().cpu().contiguous()}))

    def load(self, otherwise: str = ANEW) -> list[Tensor]:
        """All numbers, one float32 tensor [size] a tree.

        Args:
            otherwise: What to do where a shard is damaged, for the error.

        Raises:
            PrefoptError: A shard is missing, cannot be read or has the wrong size.
        """
        trees: list[Tensor] = []
        for shard in range(self.count):
            path, sizes = self._path(shard), [self.sizes[i] for i in self.trees_in(shard)]
            try:
                values = load(read_summed(path, otherwise))["log_probs"]
            except (FileNotFoundError, SafetensorError, KeyError) as error:
                raise PrefoptError(
                    f"{path}: stored log-probs cannot be read ({error}); {otherwise}"
                ) from error
            if len(values) != sum(sizes):
                raise PrefoptError(
                    f"{path}: found {len(values)} log-probs, expected {sum(sizes)}; {otherwise}"
                )
            trees.extend(values.split(sizes))
        return trees

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"


def fill_shards(
    shards: LogProbShards,
    trees: Sequence[PromptTree],
    model: nn.Module,
    read: Callable[[nn.Module, TreeBatch], Tensor],
    *,
    missing: Sequence[int],
    layout: Layout,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] | None = None,
    after_wave: Callable[[], None] | None = None,
) -> None:
    """Computes shards; each rank takes every ``world_size``-th of them.

    All ranks run the same number of forward passes, as sharded models (FSDP, ZeRO-3) demand.

    Args:
        shards: The store.
        trees: The trees, as many as the store has.
        model: The frozen model, wrapped or not, after ``enable_trees``; in eval mode.
        read: The numbers of a batch, tree by tree, such as ``sequence_log_probs``.
        missing: The shards to compute. All ranks must name the same ones, so this is asked of the
            disk before any rank begins to write.
        layout: How to lay out the batches.
        batch_size: Trees a forward pass.
        rank: This process.
        world_size: How many processes there are.
        progress: Called with the number of trees just done by this rank.
        after_wave: Called where every rank has written a shard, by all of them.
    """
    device = next(model.parameters()).device
    for wave in range(0, len(missing), world_size):
        sizes = [len(shards.trees_in(s)) for s in missing[wave : wave + world_size]]
        steps = max(-(-size // batch_size) for size in sizes)
        # a rank without a shard of its own keeps the others company with the wave's first one
        own = wave + rank if rank < len(sizes) else wave
        indices = sorted(shards.trees_in(missing[own]), key=lambda i: -trees[i].num_tokens)
        values: dict[int, Tensor] = {}
        for step in range(steps):
            chosen = indices[step * batch_size : (step + 1) * batch_size] or indices[-1:]
            batch = collate_trees([trees[i] for i in chosen], layout=layout).to(device)
            with torch.no_grad():
                found = read(model, batch).cpu()
            values.update(zip(chosen, found.split([shards.sizes[i] for i in chosen]), strict=True))
            if progress is not None and rank < len(sizes):
                progress(len(chosen))
        if rank < len(sizes):
            ordered = [values[i] for i in shards.trees_in(missing[own])]
            shards.write(missing[own], torch.cat(ordered))
        if after_wave is not None:
            after_wave()


def weights_fingerprint(model: nn.Module) -> str:
    """A 128-bit hash over the config and the names, types, shapes and bytes of all weights.

    Where weights are sharded, all processes call this.
    """
    digest = xxhash.xxh3_128()
    if isinstance(config_of := getattr(model, "config", None), PreTrainedConfig):
        config = config_of.to_dict()
        for name in ("_name_or_path", "transformers_version", "architectures"):
            config.pop(name, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict(keep_vars=True).items():
        tensor = whole_tensor(weight)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        flat: Any = tensor.cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def trees_fingerprint(trees: Iterable[PromptTree]) -> str:
    """A 128-bit hash over the token ids of trees, in order."""
    digest = xxhash.xxh3_128()
    for tree in trees:
        for part in (tree.prompt, *tree.completions):
            ids = np.asarray(part, dtype=np.int64)
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def store_key(*parts: object) -> str:
    """A folder name, 16 hex digits, from all that stored log-probs depend on."""
    return xxhash.xxh3_64("|".join(map(str, parts)).encode()).hexdigest()
