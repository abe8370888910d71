"""Two processes that share a policy's weights train, keep and save what one process would.

All jobs run in one launch (DeepSpeed's in one of its own), since starting two interpreters takes
most of the time. Accelerate does not shard with FSDP on CPUs, where its state never looks at the
plugin: ``shard_on_cpu`` has it do what it does on accelerators. prefopt's code runs as it is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from test_rounds import PROMPTS, TWO, Graded, Stopped, equal, logged, make_trainer, tiny_policy
from test_rounds_killed import ENVIRONMENT, StopBefore
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.gathered import gathered_weights, whole_weights
from prefopt.models.load import load_policy, loaded_whole
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rounds.log_probs import weights_fingerprint
from prefopt.rounds.store import read_lines
from prefopt.rounds.weights import (
    exchanged,
    follow,
    put_weights,
    read_weights,
    save_weights,
    trainable_weights,
)
from prefopt.train import read_recipe, train
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.reference import shared_fingerprint
from prefopt.trainers.rounds import RoundTrainer
from prefopt.world import build_world

pytestmark = pytest.mark.usefixtures("frozen_heap")

RECIPES = Path(__file__).parents[1] / "recipes/quickstart"
BATCH = collate_trees([PromptTree([5, 6, 7], [[8, 9], [10, 11, 12]])])
LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
EVERY_RUN: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-2,  # with less, a gradient that is rounding noise would be a whole step
    "prompts": PROMPTS[:18],  # two rounds of two steps, the second of which is on one row
    "save_strategy": "steps",
    "save_steps": 3,
}
# in shards of three one process has two and the other one, in shards of nine the other has none
RUNS: dict[str, dict[str, Any]] = {
    "online_dpo": {"prompts_per_shard": 3, "initial_policy": "initial"},
    "lora": {
        "algorithm": "online_dpo",
        "prompts_per_shard": 3,
        "peft_config": LORA,
        "learning_rate": 0.1,
    },
    "nash_mp": {"prompts_per_shard": 9, "prompts_per_round": 9, "kappa": 0.5},
}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
SHARDING: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {
        "deepspeed": {
            **ZERO,
            "zero_optimization": {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "stage3_param_persistence_threshold": 500,  # norms stay gathered, matrices do not
            },
        }
    },
}
BY_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


# --- in both processes ---------------------------------------------------------------------------


def shard_on_cpu() -> None:
    """Has accelerate's state take up the FSDP plugin on CPUs, as it does on accelerators."""
    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def forget_sharding() -> None:
    """Accelerate's state and its marks in the environment outlive a trainer."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)


def make(folder: Path, run: str, kind: str, **more: Any) -> RoundTrainer:
    """A trainer on a global batch of eight."""
    forget_sharding()
    settings = {"algorithm": run, **EVERY_RUN, **RUNS[run], **SHARDING[kind], **more}
    settings["per_device_train_batch_size"] = 8 if kind == "alone" else 4
    if kind != "alone":
        settings["ddp_backend"] = "gloo"
    model = policy_of(run)
    return make_trainer(folder / kind / run, model=model, **settings)


def policy_of(run: str) -> LlamaForCausalLM:
    """The policy a run begins with; Nash-MP's has its embeddings for a head."""
    model = tiny_policy()
    if run == "nash_mp":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def whole(trainer: RoundTrainer) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in gathered_weights(trainer.model_wrapped)}


def read(trainer: RoundTrainer) -> Tensor:
    trainer.model_wrapped.eval()
    with torch.no_grad():
        return sequence_log_probs(trainer.model_wrapped, BATCH)


def resumed(folder: Path, run: str, kind: str) -> dict[str, Tensor]:
    """The weights at the end of a run that another trainer went on with after three steps."""
    folder = folder / "stopped"
    try:
        make(folder, run, kind, callbacks=[StopBefore(3)]).train()
    except Stopped:
        trainer = make(folder, run, kind)
        checkpoint = last_complete_checkpoint(folder / kind / run)
        assert checkpoint is not None
        assert checkpoint.name == "checkpoint-3"
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return whole(trainer)


def lends(trainer: RoundTrainer, folder: Path, kind: str) -> dict[str, Tensor]:
    """Log-probs under weights that are lent, averaged, put, written and read."""
    policy, found = trainer.policy, {"own": read(trainer)}
    kept = trainable_weights(policy)
    other = {name: weight * 1.5 for name, weight in kept.items()}
    with exchanged(policy, other):
        found["lent"] = read(trainer)
    found["own again"] = read(trainer)
    save_weights(policy, other, folder / kind / "other")
    for writer in ("alone", kind):
        with exchanged(policy, read_weights(policy, folder / writer / "other")):
            found[f"written by {'one' if writer == 'alone' else 'itself'}"] = read(trainer)
    put_weights(policy, other)
    found["put"] = read(trainer)
    follow(kept, policy, 0.5)
    with exchanged(policy, kept):
        found["followed"] = read(trainer)
    return found


def uneven(trainer: RoundTrainer) -> float:
    """The norm of a gradient that is taken after the first process alone has sampled."""
    with whole_weights(trainer.model_wrapped):
        if PartialState().is_main_process:
            trainer.engine.generate([[5, 6, 7]], TWO)
    trainer.model_wrapped.train()
    sequence_log_probs(trainer.model_wrapped, BATCH).mean().backward()
    norm = nn.utils.clip_grad_norm_(trainer.policy.parameters(), 1.0)
    trainer.policy.zero_grad()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def jobs(folder: Path, kinds: list[str]) -> None:
    """Runs everything under some kinds of sharding; the first process writes what was found."""
    shard_on_cpu()
    for kind in kinds:
        found: dict[str, Any] = {"losses": {}}
        if kind != "ddp":
            found["loads"] = loads(folder, kind)
        for run in RUNS:
            trainer = make(folder, run, kind)
            trainer.train()
            found["losses"][run] = logged(trainer, "loss")
            if kind == "ddp":
                continue
            if kind == "fsdp" and run == "online_dpo":
                found["uneven"] = uneven(trainer)
            kept = trainable_weights(trainer.policy)
            found[f"{run} whole"] = whole(trainer)
            found[f"{run} untouched"] = equal(kept, trainable_weights(trainer.policy))
            found[f"{run} resumed"] = resumed(folder, run, kind)
            if run == "nash_mp":
                found["lends"] = lends(trainer, folder, kind)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{kind}.pt")


def recipes(folder: Path, kind: str) -> None:
    """Runs DPO from a recipe, with and without an adapter, as ``accelerate launch`` would."""
    for lora in (False, True):
        forget_sharding()
        os.environ.update(BY_ACCELERATE if kind == "fsdp" else {})
        train(read_recipe(RECIPES / "dpo.yaml", overrides(folder, kind, lora)))


def overrides(folder: Path, kind: str, lora: bool) -> list[str]:
    size = 8 if kind == "alone" else 4
    given = {
        "model.path": folder / "world/base",
        "data.path": folder / "world/preferences.jsonl",
        "run_dir": folder / kind / f"dpo-{lora}",
        "trainer.per_device_train_batch_size": size,
        "trainer.max_steps": 3,
        "trainer.logging_steps": 1,
        "trainer.learning_rate": 1e-2,
        "trainer.adam_epsilon": 1e-2,
        "rollout.max_new_tokens": 8,
        "eval.prompts": folder / "world/prompts.jsonl",
        "eval.judge": f"{{kind: preference_model, path: {folder / 'world/base'}}}",
        **({"model.lora.r": 4} if lora else {}),
        **({} if kind == "alone" else {"trainer.ddp_backend": "gloo"}),
        **({"trainer.deepspeed": folder / f"{kind}.json"} if "zero" in kind else {}),
    }
    return [f"{key}={value}" for key, value in given.items()]


def loads(folder: Path, kind: str) -> dict[str, Any]:
    """What becomes of a model that is loaded as the policy is, and as a judge is."""
    trainer = make(folder, "nash_mp", kind)  # ZeRO-3 parts what is loaded while its arguments live
    if kind == "fsdp":
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    policy = load_policy(str(folder / "world/base"))
    with loaded_whole():
        judge = load_policy(str(folder / "world/base"))
    sizes = [float(model.lm_head.weight.detach().abs().sum()) for model in (policy, judge)]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, sizes)
    fingerprint = shared_fingerprint(policy)
    if kind == "fsdp":
        os.environ.update(FSDP_CPU_RAM_EFFICIENT_LOADING="false")
    del trainer
    return {"sizes": everywhere, "fingerprint": fingerprint}


# --- in this process -----------------------------------------------------------------------------

WORKER = """
import faulthandler, os, sys
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from test_sharded import jobs, recipes

folder, kinds = Path(sys.argv[1]), sys.argv[2:]
compiles = 240 if "zero2" in kinds else 0  # seconds, on the machine's first run
faulthandler.dump_traceback_later(200 + compiles, exit=True)  # one that waits in vain says where
PartialState(cpu=True, backend="gloo")
jobs(folder, kinds)
for kind in kinds:
    if kind != "ddp":
        recipes(folder, kind)
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort while the interpreter shuts down
"""


def launch(folder: Path, *kinds: str) -> dict[str, Any]:
    """Runs all jobs in two processes; returns what they found, by kind of sharding."""
    (folder / "worker.py").write_text(WORKER)
    for kind in kinds:  # for recipes
        (folder / f"{kind}.json").write_text(json.dumps(SHARDING[kind].get("deepspeed")))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(folder / "worker.py"), str(folder), *kinds],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return {kind: torch.load(folder / f"{kind}.pt") for kind in kinds}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    build_world(path / "world", sft_rows=1, preference_rows=60, prompt_rows=5)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process finds."""
    found: dict[str, Any] = {"losses": {}}
    for run in RUNS:
        trainer = make(folder, run, "alone")
        trainer.train()
        found["losses"][run] = logged(trainer, "loss")
        if run == "online_dpo":
            found["uneven"] = uneven(trainer)
        found[f"{run} whole"] = whole(trainer)
    found["lends"] = lends(trainer, folder, "alone")
    for lora in (False, True):
        train(read_recipe(RECIPES / "dpo.yaml", overrides(folder, "alone", lora)))
    return found


@pytest.fixture(scope="module")
def pytorch(folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """What two processes find under DDP and FSDP2."""
    return launch(folder, "ddp", "fsdp")


@pytest.fixture(scope="module")
def deepspeed(folder: Path, alone: dict[str, Any]) -> dict[str, Any]:
    """What two processes find under DeepSpeed."""
    return launch(folder, "zero2", "zero3")


@pytest.fixture
def found(kind: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What two processes find under one kind of sharding."""
    return request.getfixturevalue("deepspeed" if "zero" in kind else "pytorch")[kind]


# DeepSpeed compiles an operator on the machine's first run, which takes minutes
BY_DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed"),
]
ZEROS = [pytest.param(kind, marks=BY_DEEPSPEED) for kind in ("zero2", "zero3")]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", *ZEROS])
def test_losses_are_those_of_one_process(
    kind: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    for run, losses in alone["losses"].items():
        assert len(losses) == 4
        assert max(losses) - min(losses) > 5e-3, "weights have moved"
        assert found["losses"][run] == pytest.approx(losses, abs=1e-4), run


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_gathered_weights_are_those_of_one_process(
    kind: str, found: dict[str, Any], alone: dict[str, Any], folder: Path
) -> None:
    names = list(tiny_policy().state_dict())
    for run in RUNS:
        gathered, expected = found[f"{run} whole"], alone[f"{run} whole"]
        assert list(gathered) == list(expected) == names
        for name in names:
            assert torch.allclose(gathered[name], expected[name], rtol=0, atol=1e-4), (run, name)
        assert found[f"{run} untouched"]


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_one_process_loads_their_checkpoints(
    kind: str, found: dict[str, Any], folder: Path
) -> None:
    for run in RUNS:
        checkpoint = folder / kind / run / "checkpoint-4"
        if run == "lora":
            adapted = PeftModel.from_pretrained(tiny_policy(), checkpoint)
            loaded = adapted.merge_and_unload().state_dict()
        else:
            loaded = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        gathered = found[f"{run} whole"]
        assert loaded.keys() == gathered.keys()
        for name, weight in loaded.items():
            atol = 1e-6 if run == "lora" else 0
            assert torch.allclose(weight, gathered[name], rtol=0, atol=atol), (run, name)


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_a_resumed_run_ends_with_the_same_weights(kind: str, found: dict[str, Any]) -> None:
    for run in RUNS:
        assert equal(found[f"{run} resumed"], found[f"{run} whole"]), run


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_weights_are_kept_lent_and_put(
    kind: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    reads, expected = found["lends"], alone["lends"]
    for name in ("own", "lent", "followed"):
        assert torch.allclose(reads[name], expected[name], rtol=0, atol=1e-3), name
    distinct = [reads[name] for name in ("own", "lent", "followed")]
    assert all((a - b).abs().max() > 0.1 for a in distinct for b in distinct if a is not b)
    assert torch.equal(reads["own again"], reads["own"])
    assert torch.equal(reads["put"], reads["lent"])
    assert torch.equal(reads["written by itself"], reads["lent"])
    assert torch.allclose(reads["written by one"], expected["lent"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_one_process_reads_weights_that_two_have_kept(
    kind: str, found: dict[str, Any], alone: dict[str, Any], folder: Path
) -> None:
    model = policy_of("nash_mp")
    own, theirs = (read_weights(model, folder / by / "other") for by in ("alone", kind))
    assert own.keys() == theirs.keys()
    assert all(torch.allclose(own[name], theirs[name], rtol=0, atol=1e-4) for name in own)


def test_processes_sample_different_numbers_of_times(
    pytorch: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert pytorch["fsdp"]["uneven"] == pytest.approx(alone["uneven"], rel=1e-3)


@pytest.mark.parametrize("kind", ["fsdp", pytest.param("zero3", marks=BY_DEEPSPEED)])
def test_only_the_policy_is_loaded_in_parts(kind: str, found: dict[str, Any], folder: Path) -> None:
    policy = load_policy(str(folder / "world/base"))
    full = float(policy.lm_head.weight.detach().abs().sum())
    sizes = found["loads"]["sizes"]
    assert [judge for _, judge in sizes] == pytest.approx([full, full])
    assert sizes[1][0] == 0, "a second process has nothing of the policy"
    assert found["loads"]["fingerprint"] == weights_fingerprint(policy)


@pytest.mark.parametrize("kind", ["fsdp", *ZEROS])
def test_recipes_end_in_models_that_one_process_loads(
    kind: str, found: dict[str, Any], alone: dict[str, Any], folder: Path
) -> None:
    for lora in (False, True):
        runs = [folder / by / f"dpo-{lora}" for by in ("alone", kind)]
        losses = [
            [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]
            for run in runs
        ]
        assert len(losses[0]) == 3
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)
        own, theirs = (load_policy(str(run / "final")).state_dict() for run in runs)
        begun = load_policy(str(folder / "world/base")).state_dict()
        assert own.keys() == theirs.keys() == begun.keys()
        assert any((own[name] - begun[name]).abs().max() > 1e-3 for name in own)
        for name, weight in own.items():
            assert torch.allclose(weight, theirs[name], rtol=0, atol=1e-4), name
        assert (runs[1] / "adapter").exists() == lora
        for name in ("baseline.jsonl", "0001/answers.jsonl"):
            assert len({(run / "evaluations" / name).read_text() for run in runs}) == 1, name
        rates = [json.loads((run / "summary.json").read_text())["evaluations"] for run in runs]
        assert rates[0][0]["win_rate"] == pytest.approx(rates[1][0]["win_rate"], abs=1e-2)


# --- without a second process --------------------------------------------------------------------

TARGETS = ["q_proj", "down_proj", "embed_tokens"]


@pytest.mark.parametrize("tied", [False, True])
def test_gathered_weights_of_a_plain_model_are_its_state_dict(tied: bool) -> None:
    model = tiny_policy()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.model.register_buffer("steps", torch.ones(2))
    gathered, expected = dict(gathered_weights(model)), model.state_dict()
    assert "lm_head.weight" in gathered
    assert "model.steps" in gathered
    assert equal(gathered, expected)
    assert not any(weight.requires_grad for weight in gathered.values())


def adapted(**settings: Any) -> PeftModel:
    config = LoraConfig(target_modules=TARGETS, init_lora_weights=False, **settings)
    return get_peft_model(tiny_policy(), config)


def test_gathered_weights_of_an_adapter_are_merged_in_a_copy() -> None:
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    gathered = {name: weight.clone() for name, weight in gathered_weights(model)}
    assert equal(before, dict(model.state_dict()))
    with model.disable_adapter():
        assert equal(dict(gathered_weights(model)), tiny_policy().state_dict())
    merged = model.merge_and_unload().state_dict()
    assert equal(gathered, merged)
    plain = tiny_policy().state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert len(changed) == 2 * 2 + 2, "two of each layer, the embeddings and the head"


def test_an_adapter_that_is_no_sum_is_refused() -> None:
    with pytest.raises(PrefoptError, match="not a plain LoRA"):
        list(gathered_weights(adapted(use_dora=True)))


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has trainers find FSDP or DeepSpeed on, with some settings of its plugin."""
    make = Trainer.create_accelerator_and_postprocess

    def on(name: str, **settings: Any) -> None:
        def found(self: Trainer) -> None:
            make(self)
            setattr(self, f"is_{name}_enabled", True)
            plugin = {f"{name}_plugin": SimpleNamespace(**settings), "mixed_precision": "no"}
            self.accelerator.state = SimpleNamespace(**vars(self.accelerator.state), **plugin)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", found)

    forget_sharding()
    return on


FSDP = {"activation_checkpointing": False, "cpu_ram_efficient_loading": False}


def test_two_models_that_train_are_not_sharded(pretend: Any, tmp_path: Path) -> None:
    pretend("fsdp", fsdp_version=2, **FSDP)
    with pytest.raises(PrefoptError, match=r"found FSDP, .* a critic"):
        make_trainer(tmp_path, "ppo")
    pretend("deepspeed", deepspeed_config={})
    with pytest.raises(PrefoptError, match=r"found DeepSpeed, .* a critic"):
        make_trainer(tmp_path, "ppo")
    policy = tiny_policy()
    policy.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has parted
    with pytest.raises(PrefoptError, match=r"found ZeRO-3, .* a critic"):
        make_trainer(tmp_path, "ppo", model=policy)


def test_an_opponent_is_not_sharded(pretend: Any, tmp_path: Path) -> None:
    two_phases = {"mode": "mirror_prox", "rounds": 2, "phase_rounds": 1, "prompts_per_round": 4}
    stage = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    pretend("fsdp", fsdp_version=2, **FSDP)
    with pytest.raises(PrefoptError, match="mirror_prox with FSDP"):
        make_trainer(tmp_path, "nash_mp", **two_phases)
    pretend("deepspeed", deepspeed_config={"zero_optimization": stage})
    with pytest.raises(PrefoptError, match="mirror_prox with DeepSpeed"):
        make_trainer(tmp_path, "nash_mp", **two_phases)
    pretend("deepspeed", deepspeed_config={"zero_optimization": {"stage": 2}})
    with pytest.raises(PrefoptError, match="mirror_prox with DeepSpeed"):
        make_trainer(tmp_path, "nash_mp", **two_phases)
    make_trainer(tmp_path / "ema", "nash_mp", rounds=2, prompts_per_round=4)


def test_the_first_fsdp_is_refused(pretend: Any, tmp_path: Path) -> None:
    pretend("fsdp", fsdp_version=1, **FSDP)
    with pytest.raises(PrefoptError, match=r"found FSDP version 1, .* use version 2"):
        make_trainer(tmp_path)


def test_rounds_make_optimiser_and_schedule_themselves(pretend: Any, tmp_path: Path) -> None:
    for section in ("optimizer", "scheduler"):
        pretend("deepspeed", deepspeed_config={section: {"type": "AdamW"}})
        with pytest.raises(PrefoptError, match=f"found the section {section!r}"):
            make_trainer(tmp_path)


def test_zero_3_must_save_models(pretend: Any, tmp_path: Path) -> None:
    pretend("deepspeed", deepspeed_config={"zero_optimization": {"stage": 3}})
    with pytest.raises(PrefoptError, match="stage3_gather_16bit_weights_on_model_save"):
        make_trainer(tmp_path)


def test_a_judge_in_parts_is_refused(pretend: Any, tmp_path: Path) -> None:
    judge = Graded(len)
    judge.model = tiny_policy()
    judge.model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has parted
    with pytest.raises(PrefoptError, match="judge: found its weights in the parts of ZeRO-3"):
        make_trainer(tmp_path, judge=judge)
