"""A run stops before it trains on numbers that are none, and checkpoints hold what else is trained.

Two processes are started once, which takes about ten seconds.
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
from torch import Tensor, nn
from transformers import Trainer

import prefopt
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.checkpoints import COMPLETE_MARKER, last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.guards import not_finite, unpack_trees, write_step

Weights = dict[str, Tensor]


class Poisoned(DPOTrainer):
    """Spoils one micro-batch: its loss, its gradient or both."""

    spoilt: tuple[int, int] | None = None  # the step and the micro-batch in it, both from 0
    kind = "both"
    calls = 0

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = super().tree_losses(model, inputs)
        here = divmod(self.calls, self.args.gradient_accumulation_steps)
        self.calls += 1
        if here == self.spoilt:
            if self.kind == "gradient":
                losses.register_hook(lambda gradient: gradient * torch.inf)
            else:
                losses = losses * torch.nan if self.kind == "both" else losses + torch.inf
        return losses, metrics


@pytest.fixture
def make_trainer(tiny_llama, random_trees, tmp_path):
    """Makes trainers on the same 29 pairs and the same initial weights, each in a run folder."""

    def make(run: str, kind: type[DPOTrainer] = Poisoned, **options: Any) -> Any:
        model = options.pop("model", None) or tiny_llama(sharpness=3.0)
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / run),
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trees = TreeDataset(random_trees([2] * 29))
        return kind(model, DPOConfig(**config | options), trees)

    return make


def weights(trainer: DPOTrainer) -> Weights:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def dumped(trainer: DPOTrainer) -> tuple[Path, Any]:
    (path,) = Path(trainer.args.output_dir, "non-finite").iterdir()
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize(
    ("kind", "found"),
    [("both", ["loss", "gradient"]), ("loss", ["loss"]), ("gradient", ["gradient"])],
)
def test_a_step_that_is_not_finite_is_not_taken(kind, found, max_grad_norm, make_trainer) -> None:
    """The second micro-batch of the third step: the weights are those after two steps."""
    healthy = make_trainer("healthy", max_steps=2, max_grad_norm=max_grad_norm)
    start = weights(healthy)
    healthy.train()
    assert not same(weights(healthy), start)
    trainer = make_trainer("spoilt", max_grad_norm=max_grad_norm)
    trainer.spoilt, trainer.kind = (2, 1), kind
    with pytest.raises(PrefoptError, match="step 3: not finite: " + ", ".join(found)) as error:
        trainer.train()
    assert same(weights(trainer), weights(healthy))
    path, content = dumped(trainer)
    message = str(error.value)
    assert path.name == "step-000003-process-0.json"
    assert str(path) in message
    assert "no checkpoint yet" in message
    assert "learning_rate (now 0.003)" in message
    assert "\n" not in message
    assert content["step"] == 3
    assert content["not_finite"] == found
    first, second = (torch.tensor(part["loss"]).isfinite() for part in content["micro_batches"])
    assert first
    assert second == (kind == "gradient")
    assert torch.tensor(content["norms"]["gradient"]).isfinite() == (kind == "loss")


def test_the_batch_of_a_step_can_be_played_again(make_trainer) -> None:
    trainer = make_trainer("spoilt")
    trainer.spoilt = (1, 0)
    with pytest.raises(PrefoptError):
        trainer.train()
    trees, reference = trainer.train_dataset.trees, trainer.train_dataset.columns["reference"]
    parts = dumped(trainer)[1]["micro_batches"]
    indices = [row["index"] for part in parts for row in part["trees"]]
    assert [len(part["trees"]) for part in parts] == [3, 3], "the step before is forgotten"
    assert len(set(indices)) == 6
    for part in parts:
        for row in part["trees"]:
            assert row["prompt"] == trees[row["index"]].prompt
            assert row["completions"] == trees[row["index"]].completions
        expected = torch.cat([reference[row["index"]] for row in part["trees"]])
        assert torch.equal(torch.tensor(part["columns"]["reference"]), expected)


@pytest.mark.parametrize("layout", ["tree", "separate"])
def test_trees_come_out_of_a_batch_as_they_went_in(layout, random_trees) -> None:
    trees = random_trees([2, 1, 3, 2])
    for options in ({}, {"max_row_tokens": 40, "padding_side": "left"}):
        batch = collate_trees(trees, layout=layout, **options)
        assert unpack_trees(batch) == trees


def test_the_last_good_checkpoint_is_named_and_resumes(make_trainer) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer("whole", **options)
    whole.train()
    spoilt = make_trainer("spoilt", **options)
    spoilt.spoilt = (2, 0)
    newest = Path(spoilt.args.output_dir, "checkpoint-2")
    with pytest.raises(PrefoptError, match=f"the last good checkpoint is {newest}\\."):
        spoilt.train()
    resumed = make_trainer("spoilt", **options)
    resumed.train(resume_from_checkpoint=str(newest))
    assert same(weights(resumed), weights(whole))


def test_a_weight_that_is_not_a_number_stops_the_first_step(make_trainer, tiny_llama) -> None:
    model = tiny_llama(sharpness=3.0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(PrefoptError, match="step 1: not finite: loss, gradient"):
        make_trainer("poisoned", model=model, layout="tree").train()


def test_a_scaled_gradient_may_overflow_but_a_loss_may_not(make_trainer) -> None:
    trainer = make_trainer("scaled", kind=DPOTrainer)
    infinite = torch.tensor(torch.inf)
    trainer.accelerator.scaler = object()
    assert trainer._get_grad_norm(trainer.model, infinite) is infinite
    batch = trainer.collate([trainer.train_dataset[0]])
    trainer._step.append((batch, infinite))
    with pytest.raises(PrefoptError, match="not finite: loss;"):
        trainer._get_grad_norm(trainer.model, infinite)
    trainer._step.clear()
    trainer.accelerator.scaler = None
    with pytest.raises(PrefoptError, match="not finite: gradient;"):
        trainer._get_grad_norm(trainer.model, infinite)


def test_a_further_norm_is_checked_under_its_name(make_trainer) -> None:
    trainer = make_trainer("critic", kind=DPOTrainer)
    trainer.check_finite(critic=1e30)
    with pytest.raises(PrefoptError, match="step 1: not finite: critic;"):
        trainer.check_finite(gradient=torch.tensor(1.0), critic=float("nan"))
    assert dumped(trainer)[1]["norms"]["gradient"] == 1.0
    assert not_finite(trainer.accelerator, [], {}) == []


def test_what_json_does_not_know_is_written_as_text(tmp_path) -> None:
    """The error must not fail for what some algorithm keeps in its batches."""
    trees = collate_trees([PromptTree([5], [[6]])])
    inputs = {"index": torch.tensor([0]), "trees": trees, "extra": {"a": torch.ones(2), "b": 1j}}
    write_step(tmp_path / "step.json", 1, ["loss"], {}, [(inputs, torch.tensor(1.0))])
    (part,) = json.loads((tmp_path / "step.json").read_text())["micro_batches"]
    assert part["columns"] == {"extra": {"a": [1.0, 1.0], "b": "1j"}}


def test_a_healthy_run_is_what_it_is_without_the_check(make_trainer, tiny_llama) -> None:
    class Unguarded(DPOTrainer):
        training_step = Trainer.training_step
        _get_grad_norm = Trainer._get_grad_norm

    runs = []
    for kind in (DPOTrainer, Unguarded):
        model = tiny_llama(sharpness=3.0, attention_dropout=0.2)
        trainer = make_trainer(kind.__name__, kind=kind, model=model, disable_dropout=False)
        trainer.train()
        history = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
        runs.append((weights(trainer), history))
        assert len(history) == 4
        assert not Path(trainer.args.output_dir, "non-finite").exists()
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


class Extra(DPOTrainer):
    """Keeps a number in its checkpoints and notes what is called when."""

    number = 0
    cut_at: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[str] = []
        super().__init__(*args, **kwargs)

    def save_extra(self, folder: Path) -> None:
        assert (folder / "optimizer.pt").exists()
        assert (folder / "trainer_state.json").exists()
        assert not (folder / COMPLETE_MARKER).exists()
        if self.state.global_step == self.cut_at:
            raise KeyboardInterrupt
        (folder / "number").write_text(str(self.number))
        self.seen.append("save")

    def load_extra(self, folder: Path) -> None:
        saved = torch.load(folder / "optimizer.pt")["state"]
        loaded = self.optimizer.state_dict()["state"]
        assert len(loaded) == len(saved) > 0
        assert all(torch.equal(loaded[k]["exp_avg"], saved[k]["exp_avg"]) for k in saved)
        assert self.lr_scheduler is not None
        assert self.lr_scheduler.last_epoch == 2
        assert same(weights(self), type(self.model).from_pretrained(folder).state_dict())
        self.number = int((folder / "number").read_text())
        self.seen.append("load")

    def before_training(self, resumed: bool) -> None:
        super().before_training(resumed)
        self.seen.append(f"before, resumed: {resumed}")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.number += 1
        self.seen.append("step")
        return super().training_step(*args, **kwargs)


def test_checkpoints_carry_what_else_an_algorithm_trains(make_trainer) -> None:
    options = {
        "kind": Extra,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
    }
    trainer = make_trainer("extra", **options)
    trainer.cut_at = 4
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.seen == ["before, resumed: False", *["step"] * 2, "save", *["step"] * 2]
    newest = last_complete_checkpoint(Path(trainer.args.output_dir))
    assert newest is not None
    assert newest.name == "checkpoint-2", "the one that was cut in save_extra does not count"
    resumed = make_trainer("extra", **options)
    resumed.train(resume_from_checkpoint=str(newest))
    assert resumed.seen == ["load", "before, resumed: True", *["step"] * 2, "save"]
    assert resumed.number == 4


WORKER = """
import json, os, sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.dpo import DPOConfig, DPOTrainer


class Poisoned(DPOTrainer):
    def tree_losses(self, model, inputs):
        losses, metrics = super().tree_losses(model, inputs)
        spoilt = self.state.global_step == 1 and self.args.process_index == 1
        return losses + torch.inf if spoilt else losses, metrics  # the gradient is as it was


torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16,
                                     num_hidden_layers=1, num_attention_heads=2))
args = DPOConfig(output_dir=sys.argv[1], per_device_train_batch_size=2, max_steps=3, use_cpu=True,
                 layout="tree", ddp_backend="gloo", save_strategy="no", report_to=[],
                 disable_tqdm=True)
trees = [PromptTree([3 + i, 4], [[5, 6 + i], [7 + i]]) for i in range(12)]
trainer = Poisoned(model, args, TreeDataset(trees))
try:
    trainer.train()
    said = ""
except PrefoptError as error:
    said = str(error)
    files = sorted(path.name for path in Path(sys.argv[1], "non-finite").iterdir())
everyone = [None] * 2
dist.all_gather_object(everyone, (said, files, trainer.state.global_step))
if dist.get_rank() == 0:
    Path(sys.argv[1], "everyone.json").write_text(json.dumps(everyone))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort while the interpreter shuts down
"""


def test_all_processes_stop_at_the_loss_of_one(tmp_path) -> None:
    """The second's loss is infinite; gradients, which they share, are not."""
    (tmp_path / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(Path(prefopt.__file__).parents[1]), *sys.path])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "worker.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    names = [f"step-000002-process-{rank}.json" for rank in range(2)]
    everyone = json.loads((tmp_path / "everyone.json").read_text())
    for rank, (said, files, taken) in enumerate(everyone):
        assert said.startswith("step 2: not finite: loss;")
        assert names[rank] in said
        assert files == names, "all batches are on disk before the first error"
        assert taken == 1
    first, second = (json.loads((tmp_path / "non-finite" / name).read_text()) for name in names)
    assert torch.tensor(first["micro_batches"][0]["loss"]).isfinite()
    assert second["micro_batches"][0]["loss"] == torch.inf
