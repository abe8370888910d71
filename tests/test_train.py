"""Whole runs on a small generated world: stages in order, resumption, what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from prefopt.data.template import encode_completion, encode_prompt
from prefopt.errors import PrefoptError
from prefopt.models.load import load_policy
from prefopt.reward_models import RewardModel
from prefopt.train import read_recipe, train
from prefopt.world import WorldPaths, build_world

STORIES = Path("../shared/data/tiny_lm/stories260K-hf")
QUICKSTART = Path("recipes/quickstart")
SHORT = ["trainer.per_device_train_batch_size=8", "trainer.max_steps=6", "trainer.logging_steps=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=120, preference_rows=100, prompt_rows=8)


def stage(name: str, world: WorldPaths, run_dir: Path, *overrides: str) -> dict:
    data = world.sft if name == "sft" else world.preferences
    paths = [f"model.path={world.base}", f"data.path={data}", f"run_dir={run_dir}"]
    return train(read_recipe(QUICKSTART / f"{name}.yaml", [*paths, *SHORT, *overrides]))


@pytest.fixture(scope="module")
def reward_model(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reward_model"
    summary = stage("reward_model", world, run)
    assert summary["reward_model"]["pairs"] == 10
    assert 0 <= summary["reward_model"]["accuracy"] <= 1
    return run / "final"


def test_a_run_folder_holds_what_the_design_promises(world: WorldPaths, tmp_path: Path) -> None:
    summary = stage("dpo", world, tmp_path / "run", "trainer.save_strategy=steps")
    folder = tmp_path / "run"
    assert summary["steps"] == 6
    assert {p.name for p in folder.iterdir()} >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "final", "log_probs",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert {"rewards/margins", "logps/chosen", "length/mean", "tokens_per_second"} <= rows[0].keys()
    assert not list(folder.rglob("*.partial*"))
    assert not list((folder / "final").glob("*.bin"))
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert tokenizer.chat_template
    before = AutoModelForCausalLM.from_pretrained(world.base)
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved)


def test_a_finished_run_is_not_trained_again(world: WorldPaths, tmp_path: Path) -> None:
    first = stage("sft", world, tmp_path)
    weights = tmp_path / "final" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert stage("sft", world, tmp_path) == first
    assert weights.stat().st_mtime_ns == written


def test_a_run_folder_refuses_another_recipe(world: WorldPaths, tmp_path: Path) -> None:
    stage("dpo", world, tmp_path)
    with pytest.raises(PrefoptError, match=r"other values of trainer\.beta"):
        stage("dpo", world, tmp_path, "trainer.beta=0.3")


def test_checkpoints_of_other_data_are_not_continued(world: WorldPaths, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(world.preferences.read_text())
    options = [f"data.path={rows}", "trainer.save_strategy=steps", "trainer.save_steps=2"]
    stage("dpo", world, tmp_path / "run", *options)
    (tmp_path / "run" / "summary.json").unlink()
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-20]))
    with pytest.raises(PrefoptError, match="begun with other rows"):
        stage("dpo", world, tmp_path / "run", *options)


def test_held_out_rows_are_evaluated(world: WorldPaths, tmp_path: Path) -> None:
    summary = stage("dpo", world, tmp_path, "data.eval_fraction=0.2")
    assert {"eval_loss", "eval_rewards/accuracies"} <= summary["evaluation"].keys()


def test_lora_leaves_a_plain_model_and_its_adapter(world: WorldPaths, tmp_path: Path) -> None:
    stage("dpo", world, tmp_path, "model.lora={r: 4}", "trainer.learning_rate=0.01")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    base = AutoModelForCausalLM.from_pretrained(world.base)
    assert merged.state_dict().keys() == base.state_dict().keys()
    query = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[query], base.state_dict()[query])


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["model.lora={r: 4}", "trainer.learning_rate=0.01"],
        ["model.lora={r: 4}", "trainer.learning_rate=0.01", "trainer.bf16=true",
         "model.dtype=bfloat16"],
    ],
    ids=["all weights", "LoRA", "LoRA, bfloat16"],
)  # fmt: skip
def test_gradient_checkpointing_changes_no_loss(
    options: list[str], world: WorldPaths, tmp_path: Path
) -> None:
    losses, norms = {}, {}
    for on in ("false", "true"):
        run = tmp_path / on
        short = ["trainer.max_steps=3", "trainer.logging_steps=1", "trainer.warmup_steps=0"]
        stage("dpo", world, run, *options, *short, f"trainer.gradient_checkpointing={on}")
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        losses[on], norms[on] = ([row[key] for row in rows] for key in ("loss", "grad_norm"))
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-6)
    assert norms["true"] == pytest.approx(norms["false"], rel=1e-6)
    assert min(norms["true"]) > 0
    assert losses["true"][-1] != pytest.approx(losses["true"][0], abs=1e-3)  # something is learnt


def test_an_adapter_on_quantised_weights_is_merged_into_whole_ones(
    world: WorldPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def load_whole(path: str, *, quantization: str | None, **options: Any) -> PreTrainedModel:
        asked.append(quantization)
        return load_policy(path, **options)

    monkeypatch.setattr("prefopt.train.check_quantization", lambda name: None)
    monkeypatch.setattr("prefopt.train.load_policy", load_whole)
    stage("dpo", world, tmp_path, "model.lora={r: 4}", "model.quantization=nf4")
    assert asked == ["nf4", None]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final")


@pytest.mark.parametrize(
    ("gpu", "words"),
    [(False, "without a CUDA device"), (True, r"pip install 'prefopt\[qlora\]'")],
)
def test_quantisation_says_what_it_needs(
    gpu: bool, words: str, world: WorldPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefopt.models.load.find_spec", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    with pytest.raises(PrefoptError, match=words):
        load_policy(str(world.base), quantization="nf4")
    if not gpu:
        with pytest.raises(PrefoptError, match=words):
            stage("dpo", world, tmp_path / "run", "model.lora={}", "model.quantization=int8")
        assert not (tmp_path / "run").exists()


# over 20 s: three processes import torch and transformers
@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    name: str, world: WorldPaths, tmp_path: Path
) -> None:
    data = world.sft if name == "sft" else world.preferences

    def command(run_dir: Path) -> list[str]:
        options = [
            f"model.path={world.base}", f"data.path={data}", f"run_dir={run_dir}",
            "trainer.per_device_train_batch_size=2", "trainer.save_strategy=steps",
            "trainer.save_steps=5", "trainer.max_steps=30",
        ]  # fmt: skip
        return [
            sys.executable,
            "-m",
            "prefopt",
            "train",
            str(QUICKSTART / f"{name}.yaml"),
            *options,
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, env=environment)
    process = subprocess.Popen(command(killed), env=environment)
    while process.poll() is None and not list(killed.glob("checkpoints/*/complete.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "final").exists(), "the run ended before it could be killed"
    for marker in killed.glob("checkpoints/*/complete.json"):
        facts = json.loads(marker.read_text())
        assert 0 < facts["seconds"] < 1000
        marker.write_text(json.dumps(facts | {"seconds": facts["seconds"] + 1000}))
    subprocess.run(command(killed), check=True, env=environment)
    a, b = (load_file(run / "final" / "model.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    lines = [
        [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, killed)
    ]
    assert lines[0] == lines[1]
    # the time of a run is that of all its processes
    assert json.loads((killed / "summary.json").read_text())["seconds"] > 1000


def prompts_and_answers(world: WorldPaths) -> tuple[list, list[str], list[str]]:
    rows = [json.loads(line) for line in world.preferences.read_text().splitlines()[:20]]
    return (
        [row["prompt"] for row in rows],
        [row["chosen"][0]["content"] for row in rows],
        [row["rejected"][0]["content"] for row in rows],
    )


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_transformers_reads_the_same_scores_from_a_saved_reward_model(
    padding_side: str, world: WorldPaths, reward_model: Path
) -> None:
    prompts, chosen, _ = prompts_and_answers(world)
    ours = RewardModel.from_pretrained(str(reward_model)).score(prompts, chosen)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model, padding_side=padding_side)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = [
        encode_prompt(tokenizer, p) + encode_completion(tokenizer, p, c)
        for p, c in zip(prompts, chosen, strict=True)
    ]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].numpy()
    assert np.abs(ours - theirs).max() < 1e-5
    assert ours.std() > 1e-4


def test_a_judge_does_not_care_for_batches_or_order(world: WorldPaths, reward_model: Path) -> None:
    prompts, a, b = prompts_and_answers(world)
    judge = RewardModel.from_pretrained(str(reward_model))
    expected = judge.score(prompts, a)
    judge.batch_tokens = 1
    assert np.abs(judge.score(prompts, a) - expected).max() < 1e-5
    assert np.abs(judge.score(prompts[::-1], a[::-1])[::-1] - expected).max() < 1e-5
    judge.batch_tokens, judge.tree_size = 8192, 1
    assert np.abs(judge.score([*prompts, *prompts], [*a, *b])[: len(a)] - expected).max() < 1e-5


def test_swapping_the_answers_flips_the_preference_exactly(
    world: WorldPaths, reward_model: Path
) -> None:
    prompts, a, b = prompts_and_answers(world)
    judge = RewardModel.from_pretrained(str(reward_model))
    assert np.all(judge.prefer(prompts, a, b) + judge.prefer(prompts, b, a) == 1.0)
    assert np.all(judge.prefer(prompts, a, a) == 0.5)


def test_switching_the_algorithm_needs_no_other_change(world: WorldPaths, tmp_path: Path) -> None:
    recipe = tmp_path / "shared.yaml"
    recipe.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {world.preferences}}}\n"
        f"trainer: {{algorithm: dpo, beta: 0.2, center_rewards_coefficient: 0.01, max_steps: 1}}\n"
    )
    for name in ("dpo", "reward_model"):
        overrides = [f"trainer.algorithm={name}", f"run_dir={tmp_path / name}"]
        assert train(read_recipe(recipe, overrides))["steps"] == 1


# about 20 s: two interpreters import torch and transformers
def test_two_processes_give_the_losses_of_one(world: WorldPaths, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {world.preferences}}}\n"
        f"run_dir: {tmp_path}/two\n"
        "trainer: {algorithm: dpo, max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1,"
        " learning_rate: 1.0e-3, train_sampling_strategy: sequential}\n"
    )
    command = [sys.executable, "-m", "prefopt", "train", str(recipe), "--num-processes", "2"]
    # gloo now and then aborts an interpreter that has done its work, so the status says nothing
    subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "two" / "summary.json").exists()
    one = [f"run_dir={tmp_path}/one", "trainer.per_device_train_batch_size=8"]
    train(read_recipe(recipe, one))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").open()]
        for n in ("one", "two")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final")


@pytest.mark.skipif(not STORIES.exists(), reason="../shared is not there")
def test_a_real_checkpoint_trains_one_dpo_step(world: WorldPaths, tmp_path: Path) -> None:
    template = "recipes/examples/plain-chat.jinja"
    options = [f"model.path={STORIES}", f"model.chat_template={template}"]
    step = ["trainer.max_steps=1", "trainer.warmup_steps=0", "trainer.lr_scheduler_type=constant"]
    assert stage("dpo", world, tmp_path, *options, *step)["steps"] == 1
    before, after = (
        load_file(folder / "model.safetensors") for folder in (STORIES, tmp_path / "final")
    )
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved, "one step moves the weights"
