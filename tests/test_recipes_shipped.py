"""Every recipe that ships can be read, and the examples on real data run."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefopt.train import read_recipe, train

RECIPES = sorted(Path("recipes").rglob("*.yaml"))
HH = Path("../shared/data/hh/hh_harmless_1899.jsonl.gz")


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert path.read_text().startswith("#"), "a recipe says first what it is"
    assert recipe.trainer.algorithm in ("sft", "reward_model", "dpo")


@pytest.mark.skipif(not HH.exists(), reason="../shared is not there")
@pytest.mark.parametrize("name", ["hh-harmless-reward-model", "hh-harmless-dpo"])
def test_the_examples_on_real_data_run(name: str, tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "data.max_rows=40", f"run_dir={tmp_path / 'run'}"]
    assert train(read_recipe(f"recipes/examples/{name}.yaml", short))["steps"] == 2
