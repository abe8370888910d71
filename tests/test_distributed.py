"""Two processes give the numbers of one: DDP through the trainer, FSDP2 through accelerate.

Both run in one launch, since starting two interpreters takes most of the time (about 20 seconds).
Accelerate's Accelerator never shards on CPUs (its state lists only accelerators for FSDP), so the
model goes through the function that it would call, ``fsdp2_prepare_model``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prefopt
from prefopt.data.tree import PromptTree
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.dpo import DPOConfig, DPOTrainer

WORKER = """
import json, os, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.models import logprobs
from prefopt.models.forward import enable_trees
from prefopt.models.layout_check import layout_for
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rounds.log_probs import LogProbShards, fill_shards
from prefopt.trainers import reference
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.dpo import DPOConfig, DPOTrainer

folder = Path(sys.argv[1])
task = json.loads((folder / "task.json").read_text())
trees, held_out = ([PromptTree(*tree) for tree in task[k]] for k in ("trees", "held_out"))
load = partial(AutoModelForCausalLM.from_pretrained, folder / "model")
written, forwards = [], [0]


def gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def ddp():
    write = LogProbShards.write

    def noted(self, shard, values):
        written.append(shard)
        write(self, shard, values)

    class Counted(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, trees):
            forwards[0] += 1
            return self.model(trees=trees)

    def counted(shards, trees, model, read, **kwargs):
        fill_shards(shards, trees, Counted(model), read, **kwargs)

    LogProbShards.write = noted
    reference.fill_shards = counted
    reference.LogProbShards = partial(LogProbShards, trees_per_shard=8)
    args = DPOConfig(output_dir=str(folder / "ddp"), per_device_train_batch_size=2,
                     ddp_backend="gloo", **task["options"])
    trainer = DPOTrainer(load(), args, TreeDataset(trees), eval_dataset=TreeDataset(held_out))
    trainer.train()
    weights = {k: v for k, v in trainer.model.state_dict().items()}
    same = all(len({float(v) for v in gathered(w.double().sum())}) == 1 for w in weights.values())
    if dist.get_rank() == 0:
        torch.save(weights, folder / "ddp.pt")
    return {
        "wrapper": type(trainer.model_wrapped).__name__,
        "log": trainer.state.log_history,
        "written": gathered(written),
        "forwards": gathered(forwards[0]),
        "same_weights_everywhere": same,
    }


def sharded(policy=None):
    model = load()
    enable_trees(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        mixed_precision_policy=policy,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def three_steps(model, optimiser, mine):
    losses = []
    for _ in range(3):
        model.train()
        loss = sequence_log_probs(model, collate_trees(mine)).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(sum(gathered(loss.item())) / dist.get_world_size())
    return losses


def fsdp():
    rank = dist.get_rank()
    plain, model = load(), sharded()
    enable_trees(plain)
    # made before any forward pass, as Trainer does: a pass without gradients leaves the last unit
    # gathered, and an optimiser made then would hold parameters that FSDP throws away
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (plain, model)]
    vocabulary, tokens = plain.config.vocab_size, len(collate_trees(trees[:2]).targets)
    logprobs.CHUNK_ELEMENTS["cpu"] = vocabulary * max(1, tokens // 3)
    with torch.no_grad():
        before = [sequence_log_probs(plain, collate_trees([tree])) for tree in trees]
    layout = layout_for(model.eval(), trees, torch.float32)
    store = LogProbShards(folder / "fsdp", [len(t.completions) for t in trees], 6)
    missing = store.missing()
    dist.barrier()
    fill_shards(store, trees, model, sequence_log_probs, missing=missing, layout=layout,
                batch_size=3, rank=rank, world_size=2)
    dist.barrier()
    stored = max((a - b).abs().max().item() for a, b in zip(store.load(), before, strict=True))
    losses = [
        three_steps(plain, optimisers[0], trees[:8]),
        three_steps(model, optimisers[1], trees[rank:8:2]),
    ]
    pairs = zip(plain.state_dict().values(), model.state_dict().values(), strict=True)
    half = sharded(MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    return {
        "head": type(model.lm_head).__name__,
        "layout": layout,
        "stored": stored,
        "losses": losses,
        "weights": max((a - b.full_tensor()).abs().max().item() for a, b in pairs),
        "half": str(half(trees=collate_trees(trees[:1]))["log_probs"].dtype),
    }


results = {"ddp": ddp(), "fsdp": fsdp()}
if dist.get_rank() == 0:
    (folder / "results.json").write_text(json.dumps(results))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort while the interpreter shuts down
"""

OPTIONS: dict[str, Any] = {
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_steps": 5,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> tuple[Path, dict[str, list[PromptTree]]]:
    """A folder with a model and pairs; module-wide, so the shared fixtures cannot make them."""
    import random

    from conftest import VOCABULARY, sharpen
    from transformers import LlamaConfig

    folder, source = tmp_path_factory.mktemp("distributed"), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    sharpen(AutoModelForCausalLM.from_config(config), 3.0).save_pretrained(folder / "model")

    def ids(longest: int) -> list[int]:
        return [source.randrange(3, VOCABULARY) for _ in range(source.randint(1, longest))]

    data = {
        name: [PromptTree(ids(14), [ids(11), ids(11)]) for _ in range(count)]
        for name, count in (("trees", 32), ("held_out", 8))
    }
    rows = {name: [(t.prompt, t.completions) for t in trees] for name, trees in data.items()}
    (folder / "task.json").write_text(json.dumps(rows | {"options": OPTIONS}))
    return folder, data


@pytest.fixture(scope="module")
def results(task) -> dict[str, Any]:
    folder, _ = task
    (folder / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(Path(prefopt.__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(folder / "worker.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def alone(task) -> DPOTrainer:
    """The same run in this process, at the same global batch of eight pairs."""
    folder, data = task
    args = DPOConfig(output_dir=str(folder / "alone"), per_device_train_batch_size=4, **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    held_out = TreeDataset(data["held_out"])
    trainer = DPOTrainer(model, args, TreeDataset(data["trees"]), eval_dataset=held_out)
    trainer.train()
    return trainer


def test_ddp_trains_as_one_process_does(task, results, alone) -> None:
    found = results["ddp"]
    assert found["wrapper"] == "DistributedDataParallel"
    assert found["same_weights_everywhere"]
    for kind in ("loss", "eval_loss"):
        ours = [entry for entry in found["log"] if kind in entry]
        expected = [entry for entry in alone.state.log_history if kind in entry]
        assert len(ours) == len(expected) == {"loss": 5, "eval_loss": 1}[kind]
        for entry, other in zip(ours, expected, strict=True):
            assert entry.keys() == other.keys()
            for name in entry.keys() - {"epoch"}:
                if "per_second" not in name and "runtime" not in name:
                    assert entry[name] == pytest.approx(other[name], abs=1e-4), name
    weights = torch.load(task[0] / "ddp.pt")
    moved = 0.0
    start = AutoModelForCausalLM.from_pretrained(task[0] / "model").state_dict()
    for name, value in alone.model.state_dict().items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-4), name
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-2


def test_ranks_share_the_reference_pass(results) -> None:
    written, forwards = results["ddp"]["written"], results["ddp"]["forwards"]
    assert [sorted(shards) for shards in written] == [[0, 0, 2], [1, 3]], "and one of the held out"
    assert forwards[0] == forwards[1] == 2 * 4 + 4


def test_fsdp2_trains_as_one_process_does(results) -> None:
    found = results["fsdp"]
    assert found["head"] == "FSDPLinear", "the head is a unit of its own"
    assert found["layout"] == "tree"
    assert found["stored"] < 1e-4
    plain, sharded = found["losses"]
    assert sharded == pytest.approx(plain, abs=1e-4)
    assert plain[2] < plain[0] - 0.5 or plain[2] > plain[0] + 0.5
    assert found["weights"] < 1e-5


def test_log_probs_leave_fsdp2_in_float32(results) -> None:
    assert results["fsdp"]["half"] == "torch.float32"
