"""Every recipe that ships can be read, says how to run it, and fits the recipes beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.data.template import encode_completion, encode_prompt
from prefopt.recipe import Recipe
from prefopt.train import ALGORITHMS, in_rounds, make_config, read_recipe, train

ALL = sorted(Path("recipes").rglob("*.yaml"))
RECIPES = [path for path in ALL if path.parent.name != "accelerate"]  # tests/test_launch.py
# those of the quickstart are run by `prefopt quickstart`, which sets their paths
BY_HAND = [path for path in RECIPES if path.parent.name != "quickstart"]
REAL = [path for path in BY_HAND if path.parent.name != "examples"]
# those whose header says where each value comes from; of the small twins all are ours
PUBLISHED = [path for path in REAL if path.parent.name != "qwen2.5-0.5b"]
IN_ROUNDS = [path for path in REAL if in_rounds(read_recipe(path).trainer.algorithm)]
HH = Path("../shared/data/hh/hh_harmless_1899.jsonl.gz")


class Command(NamedTuple):
    """A ``prefopt train`` line of a header."""

    processes: int
    path: str
    overrides: list[str]


def header(path: Path) -> str:
    """The comment a recipe begins with, without its ``#``."""
    lines = path.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:end])


def commands(path: Path) -> Iterator[Command]:
    for line in header(path).replace("\\\n", " ").splitlines():
        if re.match(r"prefopt train |accelerate launch ", line):
            launch, _, rest = line.partition("prefopt train ")
            processes = re.search(r"--num_processes (\d+)", launch)
            recipe, *overrides = shlex.split(rest)
            yield Command(int(processes[1]) if processes else 1, recipe, overrides)


def global_batch(path: Path, command: Command) -> int:
    args = make_config(read_recipe(path, command.overrides))
    each: int = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return each * command.processes


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_shipped_recipe_can_be_read(path: Path) -> None:
    recipe = read_recipe(path)
    assert header(path), "a recipe says first what it is"
    assert recipe.trainer.algorithm in ALGORITHMS
    make_config(recipe)


@pytest.mark.parametrize("path", BY_HAND, ids=str)
def test_the_commands_of_a_header_run_the_recipe_itself(path: Path) -> None:
    found = list(commands(path))
    assert found
    for command in found:
        assert command.path == str(path)
        make_config(read_recipe(path, command.overrides))


@pytest.mark.parametrize("path", [p for p in BY_HAND if not p.stem.startswith("hh-")], ids=str)
def test_the_global_batch_is_the_one_the_header_claims(path: Path) -> None:
    text = header(path).replace("\n", " ")
    claim = re.search(r"(?:Global batch: |product stays )(\d+)", text)
    assert claim
    for command in commands(path):
        assert global_batch(path, command) == int(claim[1])


@pytest.mark.parametrize(
    ("name", "batch", "settings"),
    [
        ("sft", 32, {"learning_rate": 2e-5, "num_train_epochs": 1}),
        ("reward_model", 512, {"learning_rate": 2e-6, "weight_decay": 1e-3, "warmup_steps": 0.03}),
        (
            "preference_model",
            128,
            {"learning_rate": 5e-6, "weight_decay": 0.0, "warmup_steps": 0.03},
        ),
        (
            "online_dpo",
            128,
            {
                "learning_rate": 5e-7,
                "warmup_steps": 0.03,
                "num_train_epochs": 2,
                "beta": 0.1,
                "rounds": 3,
                "prompts_per_round": 20_000,
                "reference": "initial",
                "pairing": "best_worst",
            },
        ),
    ],
)
def test_rlhf_workflow_has_the_settings_of_the_paper(
    name: str, batch: int, settings: dict[str, Any]
) -> None:
    """arXiv 2405.07863v3."""
    path = Path(f"recipes/rlhf-workflow/llama3-8b/{name}.yaml")
    *_, as_published = commands(path)
    assert not as_published.overrides
    assert global_batch(path, as_published) == batch
    args = make_config(read_recipe(path))
    assert {key: getattr(args, key) for key in settings} == settings
    assert args.lr_scheduler_type == "cosine"


@pytest.mark.parametrize("path", PUBLISHED, ids=str)
def test_every_setting_of_a_published_recipe_names_its_source(path: Path) -> None:
    sources = ("published", "released scripts", "re-implementation", "our choice")
    _, body = path.read_text().split("\ntrainer:\n")
    housekeeping = ("algorithm", "logging_steps", "save_steps", "per_device_eval_batch_size")
    for line in body.splitlines():
        if not line.strip().startswith(housekeeping):
            assert any(source in line for source in sources), line


@pytest.mark.parametrize(
    ("name", "batch", "settings"),
    [
        ("sft", 64, {"learning_rate": 3e-6, "num_train_epochs": 1}),
        ("reward_model", 64, {"learning_rate": 3e-6, "num_train_epochs": 1}),
        (
            "drpo",
            512,
            {
                "learning_rate": 3e-6,
                "adam_epsilon": 1e-5,
                "num_train_epochs": 4,
                "rounds": 1953,
                "reset_probability": 1.0,
                "reset_column": "completion",
                "kl_coef": 0.05,
                "clip": 0.2,
                "value_clip": 0.2,
                "vf_coef": 0.1,
                "gae_gamma": 1.0,
                "gae_lambda": 0.95,
                "missing_eos_score": -1.0,
            },
        ),
    ],
)
def test_dr_po_has_the_settings_of_its_paper_and_code(
    name: str, batch: int, settings: dict[str, Any]
) -> None:
    """arXiv 2404.08495v3; Cornell-RL/tril."""
    path = Path(f"recipes/drpo/tldr-pythia-2.8b/{name}.yaml")
    for command in commands(path):
        assert global_batch(path, command) == batch
    args = make_config(read_recipe(path))
    assert {key: getattr(args, key) for key in settings} == settings
    assert args.lr_scheduler_type == "linear"


@pytest.mark.parametrize("size", ["1.4b", "2.8b"])
def test_ppo_on_tldr_is_dr_po_without_resets(size: str) -> None:
    drpo, ppo = (
        read_recipe(f"recipes/drpo/tldr-pythia-{size}/{name}.yaml") for name in ("drpo", "ppo")
    )
    resets = {"reset_probability", "reset_column"}
    shared = {k: v for k, v in drpo.trainer.options.items() if k not in resets}
    assert ppo.trainer.options == shared
    assert (ppo.model, ppo.data, ppo.judge, ppo.rollout) == (
        drpo.model,
        drpo.data,
        drpo.judge,
        drpo.rollout,
    )


@pytest.mark.parametrize("method", ["drpo", "hypo"])
def test_the_two_sizes_on_tldr_differ_in_the_model_alone(method: str) -> None:
    large, small = (Path(f"recipes/{method}/tldr-pythia-{size}") for size in ("2.8b", "1.4b"))
    for path in sorted(large.iterdir()):
        twin = read_recipe(small / path.name).resolved()
        as_twin = str(read_recipe(path).resolved()).replace("2.8b", "1.4b")
        assert as_twin == str(twin)


def paths_of(recipe: Recipe) -> set[str]:
    judge = {recipe.judge.path} if recipe.judge else set()
    return {recipe.model.path} | judge


@pytest.mark.parametrize("path", BY_HAND, ids=str)
def test_what_a_recipe_starts_from_another_one_writes(path: Path) -> None:
    algorithm = {f"{r.run_dir}/final": r.trainer.algorithm for r in map(read_recipe, RECIPES)}
    recipe = read_recipe(path)
    for needed in paths_of(recipe):
        if needed.startswith("runs/"):
            assert needed in algorithm
    if recipe.judge:
        assert algorithm[recipe.judge.path] == recipe.judge.kind


def test_no_two_recipes_share_a_run_folder() -> None:
    folders = [read_recipe(path).run_dir for path in BY_HAND]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", IN_ROUNDS, ids=str)
def test_a_sample_fits_behind_the_longest_prompt(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.data.max_length is not None
    room = recipe.data.max_length - recipe.rollout.max_new_tokens
    assert room == recipe.data.max_prompt_length


@pytest.mark.parametrize("path", sorted(Path("recipes/rlhf-workflow").rglob("chat.jinja")), ids=str)
def test_a_shipped_template_ends_every_turn_with_its_own_token(path: Path) -> None:
    bos, end = ("<BOS>", "<|eot_id|>") if "llama3" in str(path) else (None, "<|im_end|>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.add_special_tokens([end, "<EOS>", "<BOS>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token=bos, eos_token="<EOS>", chat_template=path.read_text()
    )
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1+1?"},
    ]
    prompt, answer = encode_prompt(tokenizer, talk), encode_completion(tokenizer, talk, "2")
    assert tokenizer.convert_ids_to_tokens(answer) == ["2", end]
    assert prompt.count(tokenizer.convert_tokens_to_ids(end)) == 3
    if bos:
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.skipif(not HH.exists(), reason="../shared is not there")
@pytest.mark.parametrize("name", ["hh-harmless-reward-model", "hh-harmless-dpo"])
def test_the_examples_on_real_data_run(name: str, tmp_path: Path) -> None:
    short = ["trainer.max_steps=2", "data.max_rows=40", f"run_dir={tmp_path / 'run'}"]
    assert train(read_recipe(f"recipes/examples/{name}.yaml", short))["steps"] == 2
