"""The KL that evaluations measure, against sums worked out one token at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from prefopt.data.tokenize import tokenize_prompts
from prefopt.eval.answers import read_prompts
from prefopt.models.load import load_reward_model
from prefopt.train import read_recipe, train
from prefopt.world import WorldPaths, build_world
from prefopt.world.tokenizer import world_tokenizer

pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=24, preference_rows=24, prompt_rows=10)


def run(world: WorldPaths, folder: Path, **sections: Any) -> list[dict[str, Any]]:
    """Trains DPO for two epochs with a random reward model as the judge; the evaluations."""
    judge = folder / "judge"
    load_reward_model(str(world.base), world_tokenizer(), new_head=True).save_pretrained(judge)
    world_tokenizer().save_pretrained(judge)
    recipe = {
        "model": {"path": str(world.base), **sections.get("model", {})},
        "data": {"path": str(world.preferences)},
        "run_dir": str(folder / "run"),
        "rollout": {"max_new_tokens": 6},
        "trainer": {
            "algorithm": "dpo",
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.01,
            **sections.get("trainer", {}),
        },
        "eval": {
            "prompts": str(world.prompts),
            "judge": {"kind": "reward_model", "path": str(judge)},
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results: list[dict[str, Any]] = train(read_recipe(folder / "recipe.yaml"))["evaluations"]
    return results


def log_prob(model: Any, prompt: list[int], completion: list[int]) -> float:
    """The plain forward pass of one row."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_probs = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
    return sum(log_probs[n, token].item() for n, token in enumerate(completion))


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.1}], ids=["whole", "lora"])
def test_the_mean_log_ratio_of_samples(
    lora: dict[str, Any] | None, world: WorldPaths, tmp_path: Path
) -> None:
    results = run(world, tmp_path, model={"lora": lora})
    assert [result["after"] for result in results] == [1, 2]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    start = AutoModelForCausalLM.from_pretrained(world.base)
    prompts = tokenize_prompts(
        read_prompts(str(world.prompts)), world_tokenizer(), max_prompt_length=None
    ).prompt_ids
    samples = (tmp_path / "run" / "evaluations" / "0002" / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in samples.splitlines()]
    assert len(rows) == len(prompts)
    ratios = torch.tensor(
        [
            log_prob(final, list(prompts[row["prompt"]]), row["token_ids"])
            - log_prob(start, list(prompts[row["prompt"]]), row["token_ids"])
            for row in rows
        ]
    )
    assert results[1]["kl"] == pytest.approx(ratios.mean().item(), abs=1e-4)
    error = ratios.std().item() / len(ratios) ** 0.5
    assert results[1]["kl_standard_error"] == pytest.approx(error, abs=1e-4)
    assert abs(results[1]["kl"]) > 1e-3
    metrics = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()]
    logged = [row["evaluation/kl"] for row in metrics if "evaluation/kl" in row]
    assert logged == [result["kl"] for result in results]


def test_a_policy_that_stands_still_has_none(world: WorldPaths, tmp_path: Path) -> None:
    for result in run(world, tmp_path, trainer={"learning_rate": 0.0}):
        assert result["kl"] == pytest.approx(0, abs=1e-5)
        assert result["win_rate"] == 50
