"""What is on disk is complete or not there, and stored log-probs are never the wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rounds import log_probs, storage
from prefopt.rounds.log_probs import (
    LogProbShards,
    fill_shards,
    store_key,
    trees_fingerprint,
    weights_fingerprint,
)
from prefopt.rounds.storage import atomic_directory, atomic_write


def test_a_directory_appears_when_it_is_complete(tmp_path) -> None:
    target = tmp_path / "round"
    with atomic_directory(target) as folder:
        (folder / "a").mkdir()
        (folder / "a" / "rows").write_text("1")
        assert not target.exists()
    assert (target / "a" / "rows").read_text() == "1"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_that_fails_leaves_nothing_and_keeps_the_old_one(tmp_path) -> None:
    target = tmp_path / "round"
    for old in (False, True):
        if old:
            target.mkdir()
            (target / "rows").write_text("old")
        with pytest.raises(RuntimeError, match="cut"), atomic_directory(target) as folder:
            (folder / "rows").write_text("new")
            raise RuntimeError("cut")
        assert list(tmp_path.iterdir()) == ([target] if old else [])
    assert (target / "rows").read_text() == "old"


def test_a_directory_replaces_the_old_one_whole(tmp_path) -> None:
    target = tmp_path / "round"
    for name in ("first", "second"):
        with atomic_directory(target) as folder:
            (folder / name).touch()
    assert [p.name for p in target.iterdir()] == ["second"]


def test_a_directory_that_cannot_be_renamed_keeps_the_old_one(tmp_path, monkeypatch) -> None:
    target, rename = tmp_path / "round", Path.rename
    target.mkdir()

    def fails(self: Path, to: Path) -> Path:
        if to == target and "old" not in self.name:
            raise OSError("cut")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="cut"), atomic_directory(target) as folder:
        (folder / "rows").touch()
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_aside_is_not_taken_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(storage.os, "getpid", lambda: 42)
    stale = tmp_path / ".round.partial-42"
    stale.mkdir()
    (stale / "half").touch()
    with atomic_directory(tmp_path / "round") as folder:
        (folder / "whole").touch()
    assert [p.name for p in (tmp_path / "round").iterdir()] == ["whole"]


def test_a_file_that_cannot_be_written_keeps_the_old_content(tmp_path, monkeypatch) -> None:
    path = tmp_path / "deep" / "metrics.json"
    atomic_write(path, "old")
    atomic_write(path, b"older\n")
    assert path.read_bytes() == b"older\n"

    def full(_: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(storage, "_sync", full)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "new")
    assert path.read_bytes() == b"older\n"
    assert list(path.parent.iterdir()) == [path]


class Counted(nn.Module):
    """Stands for the frozen model: counts its forwards and fails when told to."""

    def __init__(self, model: nn.Module, fail_at: int | None = None) -> None:
        super().__init__()
        self.model, self.fail_at, self.calls, self.trees = model, fail_at, 0, 0

    def forward(self, trees: Any) -> Any:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.trees += trees.num_trees
        return self.model(trees=trees)


@pytest.fixture
def trees(random_trees) -> list[PromptTree]:
    return random_trees([2, 1, 3, 2, 2, 5, 1, 2, 2, 2, 1])


@pytest.fixture
def model(tiny_llama) -> nn.Module:
    model = tiny_llama(num_hidden_layers=1)
    enable_trees(model)
    return model


def store(folder: Path, trees: list[PromptTree], size: int = 3) -> LogProbShards:
    return LogProbShards(folder, [len(t.completions) for t in trees], trees_per_shard=size)


def fill(shards: LogProbShards, trees: list[PromptTree], model: nn.Module, **kwargs: Any) -> None:
    kwargs = {"layout": "tree", "batch_size": 2, "missing": shards.missing()} | kwargs
    fill_shards(shards, trees, model, sequence_log_probs, **kwargs)


def alone(model: nn.Module, trees: list[PromptTree]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [sequence_log_probs(model, log_probs.collate_trees([tree])) for tree in trees]


def assert_right(shards: LogProbShards, trees: list[PromptTree], model: nn.Module) -> None:
    for found, expected in zip(shards.load(), alone(model, trees), strict=True):
        assert found.dtype == torch.float32
        assert torch.allclose(found, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("layout", ["tree", "separate"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_stored_values_are_the_models_in_the_order_of_the_rows(
    layout, batch_size, trees, model, tmp_path
) -> None:
    shards = store(tmp_path / "s", trees)
    assert shards.missing() == [0, 1, 2, 3]
    done: list[int] = []
    fill(shards, trees, model, layout=layout, batch_size=batch_size, progress=done.append)
    assert shards.missing() == []
    assert sum(done) == len(trees)
    assert_right(shards, trees, model)


def test_an_interrupted_pass_goes_on_where_it_was(trees, model, tmp_path) -> None:
    shards = store(tmp_path, trees)
    with pytest.raises(KeyboardInterrupt):
        fill(shards, trees, Counted(model, fail_at=5))  # two forwards a shard
    assert shards.missing() == [2, 3]
    names = [f"shard-0000{i}.safetensors" for i in (0, 1)]
    assert {p.name for p in tmp_path.iterdir()} == {*names, *(f".{name}.xxh128" for name in names)}
    with pytest.raises(PrefoptError, match="shard-00002"):
        shards.load()
    before = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("shard-*"))]
    again = Counted(model)
    fill(shards, trees, again)
    assert again.trees == 5, "three trees of the third shard and two of the fourth"
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("shard-*"))][:2] == before
    assert_right(shards, trees, model)
    idle = Counted(model)
    fill(shards, trees, idle)
    assert idle.calls == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_shards_and_run_in_step(world_size, trees, model, tmp_path) -> None:
    """One after the other here, so the last ranks find the shards of the first on the disk."""
    shards = store(tmp_path, trees)
    missing, calls, written = shards.missing(), [], []
    for rank in range(world_size):
        counted, before = Counted(model), len(list(tmp_path.glob("shard-*")))
        fill(shards, trees, counted, missing=missing, rank=rank, world_size=world_size)
        calls.append(counted.calls)
        written.append(len(list(tmp_path.glob("shard-*"))) - before)
    assert len(set(calls)) == 1, "a sharded model would hang"
    assert sum(written) == 4, "no shard is written twice"
    assert max(written) == -(-4 // world_size)
    assert_right(shards, trees, model)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "short"])
def test_a_damaged_shard_is_named(damage, trees, model, tmp_path) -> None:
    shards = store(tmp_path, trees)
    fill(shards, trees, model)
    path = tmp_path / "shard-00001.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        path.write_bytes(log_probs.save({"weights": torch.zeros(7)}))
    else:
        shards.write(1, torch.zeros(3))
    with pytest.raises(PrefoptError, match=r"shard-00001\.safetensors.*delete this file") as caught:
        shards.load()
    assert "\n" not in str(caught.value)


def test_the_fingerprint_of_weights_sees_every_bit(tiny_llama) -> None:
    seen = {weights_fingerprint(tiny_llama())}
    assert weights_fingerprint(tiny_llama()) in seen

    def new(model: nn.Module) -> bool:
        size = len(seen)
        seen.add(weights_fingerprint(model))
        return len(seen) == size + 1

    assert new(tiny_llama(seed=1))
    assert new(tiny_llama().bfloat16())
    assert new(tiny_llama(attention_bias=True))
    touched = tiny_llama()
    with torch.no_grad():
        bits = touched.model.layers[1].mlp.up_proj.weight.view(torch.int32)
        bits[0, 0] ^= 1
    assert new(touched)


def test_enabling_trees_leaves_the_fingerprint_of_weights_alone(tiny_llama) -> None:
    model = tiny_llama()
    before = weights_fingerprint(model)
    enable_trees(model)
    assert weights_fingerprint(model) == before


def test_the_fingerprint_of_trees_sees_ids_order_and_boundaries() -> None:
    different = [
        [PromptTree([1, 2], [[3], [4]])],
        [PromptTree([1, 2], [[4], [3]])],
        [PromptTree([1, 2], [[3, 4]])],
        [PromptTree([1], [[2, 3], [4]])],
        [PromptTree([1, 2], [[3]]), PromptTree([4], [[5]])],
        [PromptTree([4], [[5]]), PromptTree([1, 2], [[3]])],
        [PromptTree([1, 2], [[3], [4]]), PromptTree([5], [[6]])],
        [PromptTree([1, 2], [[3], [4], [5], [6]])],
        [PromptTree([1, 2], [[3], [5]])],
    ]
    assert len({trees_fingerprint(trees) for trees in different}) == len(different)
    as_tuple = [PromptTree((1, 2), ((3,), (4,)))]
    assert trees_fingerprint(as_tuple) == trees_fingerprint(different[0])


def test_the_key_changes_with_every_part() -> None:
    parts: list[Any] = ["weights", "rows", 1024, 2048, torch.float32, "tree"]
    keys = {store_key(*parts)}
    for i, other in enumerate(["w", "r", None, 1024, torch.bfloat16, "separate"]):
        keys.add(store_key(*parts[:i], other, *parts[i + 1 :]))
    assert len(keys) == len(parts) + 1
    assert all(len(key) == 16 for key in keys)
