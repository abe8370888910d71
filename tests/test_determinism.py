"""The same recipe and seed give the same weights on CPU, bit for bit; what may differ is said.

Runs are tiny. Some 50 s of CPU, half of it in two processes of different hash seeds, each of which
trains all ten algorithms.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from report_folders import Page

from prefopt.determinism import Circumstances, circumstances, determinism
from prefopt.eval.report import write_report
from prefopt.recipe import Recipe
from prefopt.run_folder import environment
from prefopt.train import read_recipe, train
from prefopt.world import WorldPaths, build_world

pytestmark = pytest.mark.usefixtures("frozen_heap")

OFFLINE = ("sft", "dpo", "reward_model", "preference_model")
IN_ROUNDS = ("online_dpo", "inpo", "hypo", "nash_mp", "ppo", "drpo")
NOISE = {"lora": {"r": 2, "dropout": 0.3}}  # dropout, so that a stray draw of noise shows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=16, preference_rows=16, prompt_rows=4)


@pytest.fixture(scope="module")
def reward_model(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    run("reward_model", world, folder, model={})
    return folder / "reward_model/final"


def sections(algorithm: str, world: WorldPaths, folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe: four steps over two epochs, or in two rounds."""
    options = more.pop("trainer", {})
    return {
        "name": algorithm,
        "run_dir": str(folder / algorithm),
        "model": {"path": str(world.base), **more.pop("model", NOISE)},
        "data": {"path": str(world.sft if algorithm == "sft" else world.preferences)},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 4},
        "trainer": {
            "algorithm": algorithm,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 1 if algorithm in IN_ROUNDS else 2,
            "logging_steps": 1,
            "save_strategy": "no",
            **({"rounds": 2, "prompts_per_round": 8} if algorithm in IN_ROUNDS else {}),
            **options,
        },
        **more,
    }


def reordered(value: Any) -> Any:
    """The same sections and keys, the last ones first."""
    if not isinstance(value, dict):
        return value
    return {key: reordered(value[key]) for key in reversed(value)}


def run(algorithm: str, world: WorldPaths, folder: Path, **more: Any) -> str:
    """Trains, and returns the sum of the weights."""
    path = folder / f"{algorithm}.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps(sections(algorithm, world, folder, **more)))
    train(read_recipe(path))
    return weights(folder / algorithm)


def weights(folder: Path) -> str:
    return sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("algorithm", OFFLINE)
def test_the_number_of_data_workers_changes_nothing(
    algorithm: str, world: WorldPaths, tmp_path: Path
) -> None:
    several: list[dict[str, Any]] = [
        {},
        {"dataloader_num_workers": 1},
        {
            "dataloader_num_workers": 2,
            "dataloader_prefetch_factor": 3,
            "dataloader_persistent_workers": True,
        },
    ]
    found = {
        run(algorithm, world, tmp_path / str(number), trainer=options)
        for number, options in enumerate(several)
    }
    assert len(found) == 1
    start = sha256((world.base / "model.safetensors").read_bytes()).hexdigest()
    assert start not in found


def test_a_seed_changes_everything(world: WorldPaths, tmp_path: Path) -> None:
    assert run("dpo", world, tmp_path / "0") != run("dpo", world, tmp_path / "1", seed=1)


def test_a_resumed_run_with_workers_ends_like_one_without(
    world: WorldPaths, tmp_path: Path
) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    whole = run("dpo", world, tmp_path / "whole", trainer=saves)
    options = saves | {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    folder = tmp_path / "resumed"
    assert run("dpo", world, folder, trainer=options) == whole
    for step in (1, 3):  # in the middle of an epoch
        (folder / "dpo/summary.json").unlink()
        shutil.rmtree(folder / "dpo/final")
        for later in range(step + 1, 5):
            shutil.rmtree(folder / f"dpo/checkpoints/checkpoint-{later}")
        assert run("dpo", world, folder, trainer=options) == whole


PROCESS = """
import json, sys
from prefopt.train import read_recipe, train
for path in sys.argv[1:]:
    train(read_recipe(path))
"""


def test_processes_of_other_hash_seeds_write_the_same(
    world: WorldPaths, reward_model: Path, tmp_path: Path
) -> None:
    """Of every algorithm: weights, rounds, adapters, log-probs, and every number of the log.

    The second process has the keys of the recipes the other way around, and data workers.
    """
    algorithms = (*OFFLINE, *IN_ROUNDS)
    processes = []
    for number, workers in enumerate((0, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for algorithm in algorithms:
            recipe = sections(
                algorithm,
                world,
                folder,
                judge={"kind": "reward_model", "path": str(reward_model)},
                trainer={"dataloader_num_workers": workers},
            )
            text = json.dumps(reordered(recipe) if number else recipe)
            (folder / f"{algorithm}.yaml").write_text(text)
        paths = [str(folder / f"{algorithm}.yaml") for algorithm in algorithms]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, *paths],
                env=os.environ | {"PYTHONHASHSEED": str(number + 1), "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    for algorithm in algorithms:
        first, second = (contents(tmp_path / str(number) / algorithm) for number in (0, 1))
        assert first.keys() == second.keys(), algorithm
        assert [name for name in first if first[name] != second[name]] == [], algorithm


def contents(folder: Path) -> dict[str, Any]:
    """What a run has written, but for times and what names the run's own folder."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name in (".lock", "environment.json", "recipe.yaml") or path.is_dir():
            continue
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name != "training_args.bin":
            found[name] = path.read_bytes()
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, list):
        return [timeless(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    times = ("time", "second", "runtime")
    return {k: timeless(v) for k, v in value.items() if not any(word in k for word in times)}


# --- what is said of it --------------------------------------------------------------------------


def test_what_is_said_follows_from_the_runs_own_facts() -> None:
    said = " ".join(determinism(Circumstances("x86_64 CPU", threads=3)))
    assert "x86_64 CPU" in said
    assert "3 thread(s) give the same weights, bit for bit" in said
    assert not {"vLLM", "processes", "API", "half precision"} & {*said.split()}
    said = " ".join(determinism(Circumstances("H100", cuda=True, half=True, processes=8)))
    assert "atomic operations" in said
    assert "runs of 8 processes" in said
    assert "In half precision" in said
    assert "bit for bit" not in said
    said = " ".join(determinism(Circumstances("H100", cuda=True, told=True)))
    assert "was told to use deterministic algorithms" in said
    assert "atomic" not in said
    said = " ".join(determinism(Circumstances("x", engine="vllm_server", api=True)))
    assert "vLLM draws" in said
    assert "An API may judge otherwise" in said


@pytest.mark.parametrize(
    ("algorithm", "trainer", "devices", "expected"),
    [
        ("dpo", {}, 0, {}),
        ("online_dpo", {}, 0, {"engine": "vllm"}),
        ("dpo", {"full_determinism": True, "bf16": False}, 1, {"cuda": True, "told": True}),
        ("dpo", {"bf16": True}, 1, {"cuda": True, "half": True}),
        ("dpo", {"use_cpu": True, "fp16": True}, 1, {"half": True}),
        ("reward_model", {}, 0, {}),
    ],
)
def test_facts_of_a_run_are_read_off_its_recipe(
    algorithm: str, trainer: dict[str, Any], devices: int, expected: dict[str, Any]
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "model": {"path": "m"},
            "data": {"path": "d"},
            "rollout": {"engine": "vllm"},
            "trainer": {"algorithm": algorithm, **trainer},
        }
    )
    found = environment() | {"device": "D", "devices": devices, "threads": 2}
    assert circumstances(recipe, found, 4) == Circumstances("D", threads=2, processes=4, **expected)


def test_report_and_environment_say_what_is_deterministic(
    world: WorldPaths, tmp_path: Path
) -> None:
    run("dpo", world, tmp_path)
    said = json.loads((tmp_path / "dpo/environment.json").read_text())["determinism"]
    assert any("bit for bit" in sentence for sentence in said)
    page = Page(write_report(tmp_path / "dpo").read_text())
    assert "What is deterministic" in page.headings
    assert all(sentence in page.text for sentence in said)
