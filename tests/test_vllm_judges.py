"""Judges under vLLM say what the judges under transformers say."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sharpen
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.models.load import load_policy, load_tokenizer
from prefopt.reward_models import PreferenceModel, RewardModel, load_judge
from prefopt.reward_models.vllm_judges import (
    VllmPreferenceModel,
    VllmRewardModel,
    _fingerprint,
)
from prefopt.train import read_recipe, train
from prefopt.trainers.critic import _judge_model
from prefopt.world.tokenizer import world_tokenizer, world_words

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

CLASSES = {"causal": LlamaForCausalLM, "scalar": LlamaForSequenceClassification}


def texts(count: int, seed: int, longest: int = 9) -> list[str]:
    rng, words = random.Random(seed), world_words()
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def questions(prompts: int = 6, each: int = 4) -> tuple[list, list[str], list[str]]:
    """Prompts that recur, each time with two other answers."""
    asked = [[{"role": "user", "content": text}] for text in texts(prompts, 1, 40)]
    count = prompts * each
    return [p for p in asked for _ in range(each)], texts(count, 2, 20), texts(count, 3, 20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random causal LM and a random classifier; vLLM has kernels for heads of 32 and more."""
    tokenizer, found = world_tokenizer(), {}
    for name, kind in CLASSES.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=1,
            dtype="float32",
        )
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        sharpen(kind(config).eval(), 6.0).save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def reward_model(folders: dict[str, Path]) -> Iterator[VllmRewardModel]:
    judge = load_judge("reward_model", str(folders["scalar"]), engine="vllm")
    assert isinstance(judge, VllmRewardModel)
    yield judge
    stop(judge)


@pytest.fixture(scope="module")
def preference_model(folders: dict[str, Path]) -> Iterator[VllmPreferenceModel]:
    judge = load_judge("preference_model", str(folders["causal"]), engine="vllm")
    assert isinstance(judge, VllmPreferenceModel)
    yield judge
    stop(judge)


def stop(judge: VllmRewardModel | VllmPreferenceModel) -> None:
    """Ends an engine now: whenever one is collected, it takes the state of all others along."""
    judge.llm.llm_engine.engine_core.shutdown()


def assert_same(judge: Judge, plain: Judge) -> None:
    prompts, a, b = questions()
    p = plain.prefer(prompts, a, b)
    assert judge.prefer(prompts, a, b) == pytest.approx(p, abs=1e-4)
    assert judge.score(prompts, a) == pytest.approx(plain.score(prompts, a), abs=1e-4)
    assert p.std() > 0.03, "the judgements must differ for this to mean anything"


def test_scores_are_those_of_transformers(reward_model, folders) -> None:
    assert_same(reward_model, RewardModel.from_pretrained(str(folders["scalar"]), device="cpu"))


def test_preferences_are_those_of_transformers(preference_model, folders) -> None:
    plain = PreferenceModel.from_pretrained(str(folders["causal"]), device="cpu")
    assert_same(preference_model, plain)
    prompts, a, b = questions()
    by_order = preference_model.prefer_by_order(prompts, a, b)
    assert by_order == pytest.approx(plain.prefer_by_order(prompts, a, b), abs=1e-4)
    assert np.abs(by_order[:, 0] - by_order[:, 1]).max() > 0.02


@pytest.mark.parametrize("name", ["reward_model", "preference_model"])
def test_order_and_company_do_not_matter(name: str, request: pytest.FixtureRequest) -> None:
    judge: Judge = request.getfixturevalue(name)
    prompts, a, b = questions()
    p = judge.prefer(prompts, a, b)
    assert (p + judge.prefer(prompts, b, a) == 1.0).all()
    assert (judge.prefer(prompts, a, a) == 0.5).all()
    rows = random.Random(0).sample(range(len(prompts)), len(prompts))
    columns = ([column[i] for i in rows] for column in (prompts, a, b))
    assert judge.prefer(*columns) == pytest.approx(p[rows], abs=1e-5)
    alone = [judge.prefer([prompts[i]], [a[i]], [b[i]])[0] for i in range(0, len(prompts), 5)]
    assert alone == pytest.approx(p[::5], abs=1e-5)
    assert judge.prefer([], [], []).shape == judge.score([], []).shape == (0,)


def test_loading_a_judge_draws_no_noise(folders) -> None:
    """vLLM seeds the generators of this process."""
    noise = []
    for load in (False, True):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        if load:
            load_judge("preference_model", str(folders["causal"]), engine="vllm")
        noise.append([random.random(), np.random.rand(), torch.rand(1).item()])
    assert noise[0] == noise[1]


def test_what_is_too_long_is_refused(reward_model, preference_model) -> None:
    for judge in (reward_model, preference_model):
        with pytest.raises(PrefoptError, match=r"reads \d+ tokens, but has room for 128 at once"):
            judge.prefer(["moo"], ["moo " * 200], ["woof"])


def test_a_judge_of_the_other_kind_is_refused(folders) -> None:
    with pytest.raises(PrefoptError, match="not a reward model: found LlamaForCausalLM"):
        load_judge("reward_model", str(folders["causal"]), engine="vllm")
    with pytest.raises(PrefoptError, match="expected a causal LM"):
        load_judge("preference_model", str(folders["scalar"]), engine="vllm")


def test_what_vllm_cannot_serve_is_named(folders, tmp_path: Path) -> None:
    config = json.loads((folders["scalar"] / "config.json").read_text())
    config |= {"architectures": ["BloomForSequenceClassification"], "model_type": "bloom"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    world_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PrefoptError, match=r"vLLM cannot serve .*; use the engine transformers"):
        load_judge("reward_model", str(tmp_path), engine="vllm")


def test_without_vllm_the_error_says_what_to_install(folders, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PrefoptError, match=r"pip install .prefopt\[vllm\]"):
        load_judge("reward_model", str(folders["scalar"]), engine="vllm")


def test_the_fingerprint_is_of_the_weights(
    reward_model, preference_model, folders, tmp_path: Path
) -> None:
    copy = shutil.copytree(folders["scalar"], tmp_path / "copy")
    assert _fingerprint(copy) == reward_model.fingerprint != preference_model.fingerprint
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert _fingerprint(copy) != reward_model.fingerprint


def test_the_critic_begins_with_the_weights_that_are_served(
    reward_model, preference_model, folders
) -> None:
    tokenizer = load_tokenizer(str(folders["causal"]))
    model = _judge_model(reward_model, tokenizer)
    plain = RewardModel.from_pretrained(str(folders["scalar"]), device="cpu").model
    expected = plain.state_dict()
    assert model is not None
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert _judge_model(preference_model, tokenizer) is None


# the last test: its engine ends with it, and vLLM's state with it
def test_a_round_is_judged_under_vllm(folders, tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": [{"role": "user", "content": text}]} for text in texts(4, 5)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    results: dict[str, Any] = {}
    for engine in ("transformers", "vllm"):
        run = tmp_path / engine
        recipe = tmp_path / f"{engine}.yaml"
        recipe.write_text(
            f"model: {{path: {folders['causal']}}}\ndata: {{path: {rows}}}\nrun_dir: {run}\n"
            f"judge: {{kind: preference_model, path: {folders['causal']}, engine: {engine}}}\n"
            "rollout: {samples_per_prompt: 4, max_new_tokens: 6}\n"
            "trainer: {algorithm: online_dpo, rounds: 1, pairing: tournament,"
            " per_device_train_batch_size: 2, learning_rate: 1.0e-3, report_to: []}\n"
        )
        assert train(read_recipe(recipe))["steps"] == 4
        results[engine] = load_policy(str(run / "final")).state_dict()
    start = load_policy(str(folders["causal"])).state_dict()
    for name, weights in results["vllm"].items():
        assert (weights - results["transformers"][name]).abs().max() < 1e-4
    assert any((results["vllm"][name] - start[name]).abs().max() > 1e-4 for name in start)
