"""The vLLM engine in this process, on the CPU build of vLLM, and training on its samples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from prefopt import quickstart
from prefopt.data.tokenize import tokenize_prompts
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees
from prefopt.models.gathered import gathered_weights
from prefopt.models.load import load_policy, load_reward_model, load_tokenizer
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rollout import Completion, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rollout.vllm_engine import VLLMEngine
from prefopt.rollout.vllm_process import cannot_run, cannot_serve
from prefopt.rounds.store import Sample, read_rollouts
from prefopt.train import read_recipe, train
from prefopt.world import build_world
from prefopt.world.tokenizer import world_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(cannot_run() is not None, reason=str(cannot_run())),
]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOKENIZER = world_tokenizer()
EOS = TOKENIZER.eos_token_id
SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,  # vLLM's attention on a CPU takes heads of 32
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": EOS,
    "initializer_range": 0.3,
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 8, 30, 20], [5, 6, 8]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def built(request: Any) -> tuple[LlamaForCausalLM, VLLMEngine]:
    """A model and an engine that has its weights."""
    torch.manual_seed(0)
    from transformers import LlamaConfig

    shape = {**SHAPE, "num_hidden_layers": 2, "intermediate_size": 96}
    config = LlamaConfig(**shape, max_position_embeddings=128, tie_word_embeddings=request.param)
    model = LlamaForCausalLM(config).eval()
    enable_trees(model)
    engine = VLLMEngine(
        model.config, TOKENIZER, stop_token_ids=[EOS], context_length=64, dtype="float32"
    )
    return model, engine


@pytest.fixture
def pair(built: Any) -> Iterator[tuple[LlamaForCausalLM, VLLMEngine]]:
    """The same, as they were at first whatever a test does to them."""
    model, engine = built
    before = {name: w.clone() for name, w in model.state_dict().items()}
    engine.push(gathered_weights(model))
    yield model, engine
    model.load_state_dict(before)


def move(model: torch.nn.Module, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * by)


def gap(model: torch.nn.Module, engine: VLLMEngine) -> float:
    """The largest difference of log-probs of a token, in nats."""
    sequences = [[*prompt, *prompt, 7] for prompt in PROMPTS]
    batch = collate_trees([PromptTree(ids[:1], [ids[1:]]) for ids in sequences])
    own = model(trees=batch)["log_probs"]
    said = torch.tensor([p for each in engine.log_probs(sequences)[0] for p in each])
    return (own - said).abs().max().item()


def log_probs(model: Any, found: list[list[Completion]], temperature: float = 1.0) -> Tensor:
    trees = [
        PromptTree(prompt, [completion.token_ids for completion in group])
        for prompt, group in zip(PROMPTS, found, strict=True)
    ]
    with torch.no_grad():
        return sequence_log_probs(model, collate_trees(trees), temperature)


def test_greedy_answers_are_those_of_transformers_token_for_token(pair: Any) -> None:
    model, engine = pair
    settings = SamplingSettings(max_new_tokens=24, temperature=0)
    found = engine.generate(PROMPTS, settings)
    theirs = TransformersEngine(model, TOKENIZER, stop_token_ids=[EOS])
    assert found == theirs.generate(PROMPTS, settings)
    assert len({tuple(group[0].token_ids) for group in found}) == len(PROMPTS)
    ends = {group[0].finish_reason for group in theirs.generate(PROMPTS, settings)}
    assert "length" in ends


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_samples_come_with_their_log_probs_at_the_temperature(
    pair: Any, temperature: float
) -> None:
    model, engine = pair
    settings = SamplingSettings(max_new_tokens=16, temperature=temperature, samples_per_prompt=4)
    found = engine.generate(PROMPTS, settings)
    said = torch.tensor([c.log_prob for group in found for c in group])
    torch.testing.assert_close(log_probs(model, found, temperature), said, atol=1e-4, rtol=1e-5)
    cut = engine.generate(PROMPTS, replace(settings, top_k=3))
    assert all(c.log_prob != c.log_prob for group in cut for c in group), "of another distribution"


def test_a_sample_depends_on_seed_prompt_and_number_alone(pair: Any) -> None:
    _, engine = pair
    settings = SamplingSettings(max_new_tokens=12, samples_per_prompt=3, seed=5)
    told: dict[int, list[Completion]] = {}
    together = engine.generate(PROMPTS, settings, done=lambda i, group: told.update({i: group}))
    assert [told[index] for index in range(len(PROMPTS))] == together
    assert len({tuple(c.token_ids) for group in together for c in group}) > 2 * len(PROMPTS)
    assert [engine.generate([prompt], settings)[0] for prompt in PROMPTS] == together
    later = replace(settings, samples_per_prompt=2, first_sample=1)
    assert [group[1:] for group in together] == engine.generate(PROMPTS, later)
    assert engine.generate(PROMPTS, replace(settings, seed=6)) != together
    each = [replace(settings, max_new_tokens=n) for n in (1, 12, 4, 2, 7)]
    for whole, own, part in zip(together, each, engine.generate(PROMPTS, each), strict=True):
        assert [c.token_ids for c in part] == [c.token_ids[: own.max_new_tokens] for c in whole]


def test_a_push_is_the_new_policy_to_rounding(pair: Any) -> None:
    model, engine = pair
    assert gap(model, engine) < 1e-4
    settings = SamplingSettings(max_new_tokens=24, temperature=0)
    before = engine.generate(PROMPTS, settings)
    move(model)
    assert gap(model, engine) > 0.1, "the engine has the old weights still"
    engine.push(gathered_weights(model))
    assert gap(model, engine) < 1e-4
    after = engine.generate(PROMPTS, settings)  # the cached prefixes of old weights are gone
    assert after == TransformersEngine(model, TOKENIZER, stop_token_ids=[EOS]).generate(
        PROMPTS, settings
    )
    assert after != before


def test_a_forgotten_head_shows_in_log_probs(pair: Any) -> None:
    model, engine = pair
    tied = model.config.tie_word_embeddings
    move(model)
    engine.push((n, w) for n, w in gathered_weights(model) if n != "lm_head.weight")
    found = gap(model, engine)
    engine.push(gathered_weights(model))
    assert gap(model, engine) < 1e-4
    assert tied or found > 0.1, "only vLLM itself can make a tied head of the embeddings"


def test_an_adapter_is_pushed_merged_and_left_as_it_is(pair: Any) -> None:
    model, engine = pair
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    try:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        before = {name: w.clone() for name, w in adapted.state_dict().items()}
        assert gap(adapted, engine) > 0.1
        engine.push(gathered_weights(adapted))
        assert gap(adapted, engine) < 1e-4
        assert all(torch.equal(w, before[name]) for name, w in adapted.state_dict().items())
    finally:
        adapted.unload()


@pytest.mark.parametrize(
    ("temperature", "message"),
    [(0.001, r"temperature is 0.001, expected 0 \(greedy\) or 0.01 to 2,"), (2.5, "is 2.5")],
)
def test_temperatures_that_vllm_would_change_are_refused(
    pair: Any, temperature: float, message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        pair[1].generate(PROMPTS, SamplingSettings(max_new_tokens=2, temperature=temperature))


def test_a_prompt_without_room_is_refused(pair: Any) -> None:
    with pytest.raises(PrefoptError, match="prompt 1 has 60 tokens"):
        pair[1].generate([[5], [5] * 60], SamplingSettings(max_new_tokens=5))
    assert pair[1].generate([], SamplingSettings()) == []


def test_weights_of_another_model_are_refused(pair: Any) -> None:
    model, engine = pair
    with pytest.raises(PrefoptError, match="cannot be taken over"):
        engine.push([("model.layers.0.nothing.weight", torch.zeros(2, 2))])
    engine.push(gathered_weights(model))
    assert gap(model, engine) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, r"heads have one of .*, and this model's 16; use"),
        ({"architectures": ["NoneSuchForCausalLM"]}, "does not know NoneSuchForCausalLM"),
    ],
)
def test_models_that_vllm_has_no_code_for_are_refused(
    pair: Any, changes: dict[str, Any], message: str
) -> None:
    config = pair[0].config.__class__(**pair[0].config.to_dict() | {"head_dim": None} | changes)
    with pytest.raises(PrefoptError, match=message):
        VLLMEngine(config, TOKENIZER, stop_token_ids=[EOS], context_length=64, dtype="float32")
    assert message.split(",")[0].split(" have")[0] in str(cannot_serve(config))


def test_threads_and_noise_of_training_are_left_alone(pair: Any) -> None:
    _, engine = pair
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    engine.generate(PROMPTS, SamplingSettings(max_new_tokens=8, samples_per_prompt=2))
    engine.log_probs([[5, 6, 7]])
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


# --- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with judges of both kinds, and the quickstart's recipes cut down to it."""
    folder = tmp_path_factory.mktemp("vllm")
    paths = build_world(folder / "world", sft_rows=1, preference_rows=60, prompt_rows=1)
    tokenizer = load_tokenizer(str(paths.base))
    judge = load_reward_model(str(paths.base), tokenizer, new_head=True)
    judge.save_pretrained(folder / "reward_model")
    tokenizer.save_pretrained(folder / "reward_model")
    for recipe in quickstart.RECIPES.glob("*.yaml"):
        text = re.sub(r"(prompts_per_round|batch_size): \d+", r"\1: 8", recipe.read_text())
        text = re.sub(r"rounds: \d+", "rounds: 2", text)
        text = re.sub(r"steps_per_round: \d+.*", "steps_per_round: 1", text)
        text = text.replace("max_rows: 2048", "max_rows: 60")
        text = text.replace("{path: sft}", f"{{path: {paths.base}}}")
        text = text.replace("path: preferences.jsonl", f"path: {paths.preferences}")
        text = text.replace("path: reward_model", f"path: {folder / 'reward_model'}")
        text = text.replace("path: preference_model", f"path: {paths.base}")
        (folder / recipe.name).write_text(text)
    return folder


def logged(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


# over 20 s: an engine is built for each algorithm
@pytest.mark.parametrize("algorithm", [a for a in quickstart.available_algorithms() if a != "dpo"])
def test_every_algorithm_of_the_quickstart_samples_with_vllm(world: Path, algorithm: str) -> None:
    run = world / f"run-{algorithm}"
    overrides = [f"run_dir={run}", "rollout.engine=vllm", "trainer.logging_steps=1"]
    result = train(read_recipe(world / f"{algorithm}.yaml", overrides))
    assert result["steps"] >= 2
    gaps = logged(run, "push/gap")
    assert len(gaps) == len(list(run.glob("rounds/0*"))), "a push a round"
    assert max(gaps) < 1e-4
    assert all(seconds > 0 for seconds in logged(run, "time/push"))
    start = world / "world" / "base"
    moved = load_policy(str(run / "final")).state_dict()
    assert any(
        not torch.equal(w, moved[n]) for n, w in load_policy(str(start)).state_dict().items()
    )


def test_a_run_on_vllm_goes_on_where_it_was_and_ends_as_if_it_had_not_stopped(world: Path) -> None:
    from safetensors.torch import load_file

    common = ["rollout.engine=vllm", "trainer.save_strategy=epoch"]
    whole = world / "whole"
    train(read_recipe(world / "online_dpo.yaml", [f"run_dir={whole}", *common]))
    parts = world / "parts"
    recipe = read_recipe(world / "online_dpo.yaml", [f"run_dir={parts}", *common])
    train(recipe)
    # as a process leaves it that is killed as the second round begins
    for path in sorted(parts.glob("rounds/0001/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    last = max(parts.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (last / "complete.json").unlink()
    (parts / "summary.json").unlink()
    train(recipe)
    ended, expected = (load_file(run / "final" / "model.safetensors") for run in (parts, whole))
    assert all(torch.equal(w, ended[name]) for name, w in expected.items())


def test_evaluations_are_answered_by_vllm_and_change_nothing(world: Path) -> None:
    """By answers longer than the samples of the rounds."""
    from safetensors.torch import load_file

    base, run = world / "world" / "base", world / "evaluated"
    rows = world / "world" / "preferences.jsonl"
    asked = [f"eval.prompts={rows}", "eval.max_prompts=6", "eval.max_new_tokens=60"]
    for folder, options in ((world / "plain", []), (run, asked)):
        overrides = [f"run_dir={folder}", "rollout.engine=vllm", *options]
        train(read_recipe(world / "online_dpo.yaml", overrides))
    final = load_file(run / "final" / "model.safetensors")
    for name, weight in load_file(world / "plain" / "final" / "model.safetensors").items():
        assert torch.equal(weight, final[name])
    greedy = SamplingSettings(max_new_tokens=60, temperature=0.0)
    for file, model in (("baseline.jsonl", base), ("0002/answers.jsonl", run / "final")):
        found = [json.loads(line) for line in (run / "evaluations" / file).open()]
        ids = tokenize_prompts([row["prompt"] for row in found], TOKENIZER, max_prompt_length=None)
        engine = TransformersEngine(load_policy(str(model)), load_tokenizer(str(model)))
        groups = engine.generate(list(ids.prompt_ids), greedy)
        assert [row["completion"] for row in found] == [group[0].text for group in groups]


def test_an_engine_that_computes_otherwise_stops_the_run(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = VLLMEngine.push
    monkeypatch.setattr(
        VLLMEngine,
        "push",
        lambda self, weights: push(self, ((n, w * 1.1 if "norm" in n else w) for n, w in weights)),
    )
    overrides = [f"run_dir={world / 'sabotaged'}", "rollout.engine=vllm"]
    with pytest.raises(PrefoptError, match=r"differ by [0-9.]+ nats a token \(at most"):
        train(read_recipe(world / "online_dpo.yaml", overrides))
    assert not list((world / "sabotaged").glob("rounds/0000/draw-0/rollouts-*"))


def test_auto_takes_vllm_where_it_can_run(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="prefopt")
    run = world / "auto"
    overrides = [f"run_dir={run}", "rollout.engine=auto", "trainer.logging_steps=1"]
    train(read_recipe(world / "online_dpo.yaml", overrides))
    assert "rollout.engine: vllm" in caplog.text
    assert logged(run, "push/gap")


@pytest.mark.slow  # three interpreters import torch and vLLM
def test_two_processes_with_an_engine_each_are_one(world: Path) -> None:
    recipe, runs = world / "online_dpo.yaml", [world / "one", world / "two"]
    for processes, run in enumerate(runs, start=1):
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "-m"][: 4 * (processes - 1)]
        command = [sys.executable, "-m", *launcher, "prefopt", "train", str(recipe)]
        batch = f"trainer.per_device_train_batch_size={32 // processes}"
        options = [f"run_dir={run}", "rollout.engine=vllm", "trainer.logging_steps=1", batch]
        options += ["trainer.prompts_per_shard=2"]
        subprocess.run([*command, *options], check=True, env=ENVIRONMENT, capture_output=True)
    one, two = runs
    for index in range(2):
        ours, theirs = (read_all(run / "rounds" / f"{index:04d}") for run in runs)
        assert len(ours) == 8
        assert ours == theirs
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-4)
    assert max(logged(two, "push/gap")) < 1e-4


def read_all(folder: Path) -> dict[int, list[Sample]]:
    found: dict[int, list[Sample]] = {}
    for path in sorted(folder.glob("draw-0/rollouts-*.parquet")):
        found |= read_rollouts(path)
    return found


def test_a_call_that_fails_leaves_nothing_behind(pair: Any) -> None:
    _, engine = pair
    settings = SamplingSettings(max_new_tokens=8, samples_per_prompt=2)
    expected = engine.generate(PROMPTS, settings)

    def full_disk(index: int, group: list[Completion]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        engine.generate(PROMPTS, settings, done=full_disk)
    assert engine.generate(PROMPTS, settings) == expected
