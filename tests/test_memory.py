"""The estimate of a run's memory: counts by hand, what sharding divides, and real steps."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt.check import check
from prefopt.check_print import print_check
from prefopt.cli import main
from prefopt.data.tokenize import Ragged, TokenizedDemonstrations, TokenizedPairs, TokenizedPrompts
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.launch import shipped_configs, strategy_of
from prefopt.memory import kept_copies, largest_micro_batch, total_bytes
from prefopt.models.forward import enable_trees
from prefopt.models.memory import (
    Counts,
    Spread,
    _LiveBytes,
    cache_bytes,
    count,
    empty_model,
    logits_bytes,
    optimiser_bytes,
    state_bytes,
    step_bytes,
    with_adapter,
)
from prefopt.recipe import Recipe
from prefopt.train import make_config
from prefopt.world import WorldPaths, build_world

# hidden 32, intermediate 64, 2 layers, 4 heads and 2 key-value heads of 8, vocabulary 97, untied
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    tie_word_embeddings=False,
)
LINEAR = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # q, k and v, o, the MLP's three
LAYER = LINEAR + 2 * 32  # and two norms
ENDS = 2 * 97 * 32 + 32  # embeddings, head, the last norm
ADAPTER = 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)  # r = 4: r (in + out)
TREES = [PromptTree([0] * 30, [[0] * 20, [0] * 12]), PromptTree([0] * 9, [[0] * 31, [0] * 5])]


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def model(adapter: bool = False, **options: Any) -> torch.nn.Module:
    options = {"dtype": torch.float32} | options
    return with_adapter(empty_model(CONFIG, **options), lora() if adapter else None)


def test_parameters_are_counted_as_by_hand() -> None:
    whole = 2 * LAYER + ENDS
    assert count(model()) == Counts(whole, whole, 0, LAYER, ENDS)
    adapted = count(model(adapter=True))
    assert adapted.trained == ADAPTER
    assert adapted.total == whole + ADAPTER
    assert adapted.quantised == 2 * LINEAR
    assert adapted.layer == LAYER + ADAPTER // 2
    assert adapted.ends == ENDS
    classifier = count(model(classifier=True))
    assert classifier.total == 2 * LAYER + 97 * 32 + 32 + 32  # a score head in place of the head
    assert CONFIG.num_labels == 2, "the configuration that was handed in is as it was"


def test_tied_weights_count_once() -> None:
    tied = LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": True})
    assert count(empty_model(tied, dtype=torch.float32)).total == 2 * LAYER + ENDS - 97 * 32


def state(strategy: str = "ddp", processes: int = 1, **options: Any) -> dict[str, int]:
    options = {"dtype": torch.float32, "lora": False} | options
    counts = count(model(adapter=options["lora"]))
    return state_bytes(counts, Spread(strategy, processes), **options)


def test_one_process_keeps_everything() -> None:
    whole = 2 * LAYER + ENDS
    expected = {"weights": 4 * whole, "gradients": 4 * whole, "optimiser": 8 * whole, "gathered": 0}
    assert state() == expected
    assert state(dtype=torch.bfloat16)["optimiser"] == 4 * whole


@pytest.mark.parametrize(
    ("strategy", "divided"),
    [
        ("ddp", set()),
        ("zero2", {"gradients", "optimiser"}),
        ("zero3", {"weights", "gradients", "optimiser"}),
        ("fsdp2", {"weights", "gradients", "optimiser"}),
    ],
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_strategy_divides_what_it_should(strategy: str, divided: set[str], adapter: bool) -> None:
    several = {n: state(strategy, n, lora=adapter) for n in (2, 4, 8)}
    for part in ("weights", "gradients", "optimiser", "gathered"):
        for n, twice in pairwise(several):
            share = 2 if part in divided else 1
            assert several[n][part] == pytest.approx(several[twice][part] * share, abs=2), part


def test_ddp_has_buckets_beside_its_gradients() -> None:
    assert state("ddp", 2)["gradients"] == 2 * state("ddp", 1)["gradients"]
    assert state("ddp", 2)["weights"] == state("ddp", 1)["weights"]


@pytest.mark.parametrize(
    ("strategy", "gradients", "optimiser"),
    [("ddp", 4, 8), ("fsdp2", 4, 8), ("zero2", 2, 16), ("zero3", 2, 16)],
)
def test_an_adapter_has_no_gradients_of_all_weights(
    strategy: str, gradients: int, optimiser: int
) -> None:
    adapted = state(strategy, lora=True, dtype=torch.bfloat16)
    assert adapted["gradients"] == gradients * ADAPTER
    assert adapted["optimiser"] == optimiser * ADAPTER
    each = 2 if "zero" in strategy else 4  # DeepSpeed's adapter is bfloat16 too
    assert adapted["weights"] == 2 * (2 * LAYER + ENDS) + each * ADAPTER


@pytest.mark.parametrize(("name", "each"), [("nf4", 0.515869140625), ("int8", 1.0)])
def test_quantised_weights_are_small_and_the_rest_is_float32(name: str, each: float) -> None:
    weights = state(lora=True, dtype=torch.bfloat16, quantization=name)["weights"]
    rest = 2 * 2 * 32 + ENDS + ADAPTER
    assert weights == pytest.approx(each * 2 * LINEAR + 4 * rest, abs=1)
    # accelerate leaves them out of FSDP2
    spread = state("fsdp2", 2, lora=True, dtype=torch.bfloat16, quantization=name)
    assert spread["weights"] == pytest.approx(each * 2 * LINEAR + 4 * rest / 2, abs=1)


@pytest.mark.parametrize(
    ("optim", "each"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("lion_32bit", 4), ("sgd", 0)],
)
def test_optimisers_have_their_moments(optim: str, each: int) -> None:
    assert optimiser_bytes(optim, 1000, 4) == 1000 * each


def test_only_what_operations_make_is_alive() -> None:
    weight = torch.zeros(10, 10)
    with _LiveBytes([weight]) as live:
        view = weight.t()  # of what was there before
        first = torch.ones(5)
        del first
        second = torch.ones(3)
        assert live.now == second.nbytes
    assert live.peak == 5 * 4
    assert view.shape == weight.shape


def real_peak(adapter: bool, checkpointing: bool, bf16: bool) -> int:
    """The peak of the same step on tensors with values."""
    real: Any = LlamaForCausalLM(CONFIG)
    if adapter:
        from peft import get_peft_model

        real = get_peft_model(real, lora())
    enable_trees(real.train())
    if checkpointing:
        real.gradient_checkpointing_enable()
    batch = collate_trees(TREES)
    with _LiveBytes([*real.parameters(), *real.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = real(trees=batch)["log_probs"].sum()
        loss.backward()
    return live.peak


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_without_values_takes_what_a_real_one_takes(adapter: bool, bf16: bool) -> None:
    peaks = []
    for checkpointing in (False, True):
        options = {"checkpointing": checkpointing, "bf16": bf16}
        peaks.append(step_bytes(model(adapter), TREES, **options))
        assert peaks[-1] == pytest.approx(real_peak(adapter, **options), rel=0.02)
    assert peaks[1] < peaks[0], "checkpointing never raises the estimate"


def test_gradients_that_are_kept_or_there_already_count() -> None:
    dropped = step_bytes(model(), TREES, keep_gradients=False)
    once = step_bytes(model(), TREES)
    twice = step_bytes(model(), TREES, micro_batches=2)
    gradients = 4 * (2 * LAYER + ENDS)
    assert dropped < once < twice
    assert twice == pytest.approx(dropped + gradients, rel=0.1)


def test_separate_rows_take_more_than_trees() -> None:
    assert step_bytes(model(), TREES) < step_bytes(model(), TREES, layout="separate")


def test_a_chunk_of_logits_is_bounded() -> None:
    assert logits_bytes(10, 97, "cuda", bf16=False) == 4 * 10 * 97
    assert logits_bytes(10**6, 128_000, "cuda", bf16=True) == 8 * 2**26


def test_keys_and_values_of_samples() -> None:
    assert cache_bytes(CONFIG, sequences=3, tokens=7, each=2) == 2 * 2 * 2 * 8 * 3 * 7 * 2


# --- what a recipe says --------------------------------------------------------------------------


def recipe_of(algorithm: str, **trainer: Any) -> tuple[Any, Recipe]:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "model": {"path": "m"},
            "data": {"path": "d"},
            "judge": {"kind": "reward_model", "path": "j"},
            "rollout": {"samples_per_prompt": 3, "max_new_tokens": 10},
            "trainer": {"algorithm": algorithm, "per_device_train_batch_size": 2, **trainer},
        }
    )
    return make_config(recipe), recipe


def lengths(rows: Any, algorithm: str, **trainer: Any) -> list[tuple[int, list[int]]]:
    trees = largest_micro_batch(rows, *recipe_of(algorithm, **trainer))
    return [(len(tree.prompt), [len(ids) for ids in tree.completions]) for tree in trees]


def rows_of(*sizes: int) -> Ragged:
    return Ragged([[0] * n for n in sizes])


def test_the_largest_micro_batch_is_the_longest_rows_with_all_they_carry() -> None:
    prompts = rows_of(5, 2, 9)
    pairs = TokenizedPairs(prompts, chosen_ids=rows_of(1, 8, 2), rejected_ids=rows_of(2, 9, 2))
    assert lengths(pairs, "dpo") == [(2, [8, 9]), (9, [2, 2])]
    assert lengths(pairs, "hypo") == [(2, [8, 9, 10, 10, 10]), (9, [2, 2, 10, 10, 10])]
    assert lengths(pairs, "hypo", kl_weight=0.0) == lengths(pairs, "dpo")
    assert lengths(TokenizedPrompts(prompts), "online_dpo") == [(9, [10, 10]), (5, [10, 10])]
    assert lengths(TokenizedPrompts(prompts), "ppo") == [(9, [10] * 3), (5, [10] * 3)]
    answers = TokenizedDemonstrations(prompts, completion_ids=rows_of(3, 4, 5))
    assert lengths(answers, "drpo") == [(9, [10] * 3), (5, [10] * 3)]
    assert lengths(answers, "sft") == [(9, [5]), (9, [5])]  # rows are padded


@pytest.mark.parametrize(
    ("algorithm", "options", "copies"),
    [
        ("dpo", {}, 0),
        ("online_dpo", {}, 0),
        ("hypo", {}, 1),
        ("hypo", {"kl_weight": 0.0}, 0),
        ("ppo", {}, 1),
        ("nash_mp", {"kappa": 0.1}, 2),
        ("nash_mp", {"kappa": 1.0}, 1),
        ("nash_mp", {"mode": "mirror_prox"}, 3),
    ],
)
def test_kept_weights_are_those_of_the_documentation(
    algorithm: str, options: dict[str, Any], copies: int
) -> None:
    assert kept_copies(*recipe_of(algorithm, **options)) == copies


def test_sampling_and_training_take_turns() -> None:
    parts = {"weights": 5, "activations": 3, "logits": 1, "sampling": 7}
    assert total_bytes(parts) == 5 + 7
    assert total_bytes(parts | {"sampling": 2}) == 5 + 3 + 1


def test_accelerate_files_say_how_a_run_is_spread(tmp_path: Path) -> None:
    found = {name: strategy_of(path) for name, path in shipped_configs().items()}
    expected = {name: name for name in found} | {"multinode": "fsdp2"}
    assert found == {name: (strategy, True) for name, strategy in expected.items()}
    path = tmp_path / "own.yaml"
    for text in ("distributed_type: XLA", "num_processes: 2", "- a", "{"):
        path.write_text(text)
        with pytest.raises(PrefoptError, match=r"own\.yaml"):
            strategy_of(path)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=20, preference_rows=20, prompt_rows=4)


@pytest.fixture
def recipe(world: WorldPaths, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {world.preferences}}}\n"
        "trainer: {algorithm: dpo, per_device_train_batch_size: 2}\n"
    )
    return path


def test_check_says_whether_it_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spread = ["--accelerate", "fsdp2", "--num-processes", "8", "--device-memory"]
    assert main(["check", str(recipe), *spread, "80", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"] is True
    assert memory["total"] == total_bytes(memory["parts"])
    assert memory["machine"]["spread"] == {"strategy": "fsdp2", "processes": 8}
    assert memory["verdict"] == "fits: policy 0.7M + optimiser, FSDP2 x 8, 0 of 80 GiB"
    assert main(["check", str(recipe), *spread, "0.001"]) == 0
    printed = capsys.readouterr().out
    assert "at the peak" in printed
    assert "does not fit: policy 0.7M + optimiser, FSDP2 x 8" in printed
    assert "try gradient_checkpointing, a smaller per_device_train_batch_size, LoRA\n" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU says how large it is")
def test_without_a_device_only_the_estimate_is_said(recipe: Path) -> None:
    memory = check(recipe)["memory"]
    assert "fits" not in memory
    assert memory["verdict"].startswith("policy 0.7M + optimiser, DDP x 1: ")
    tokens = check(recipe, ["trainer.per_device_train_batch_size=1"])["memory"]
    assert tokens["micro_batch_tokens"] < memory["micro_batch_tokens"]
    assert tokens["parts"]["activations"] < memory["parts"]["activations"]
    assert check(recipe, ["trainer.optim=sgd"])["memory"]["parts"]["optimiser"] == 0


def test_several_processes_are_those_of_ddp(recipe: Path) -> None:
    machine = check(recipe, processes=4)["memory"]["machine"]
    assert machine["spread"] == {"strategy": "ddp", "processes": 4}
    assert machine["bf16"] is True
    assert machine["device"] == "cuda"


def test_what_trains_beside_the_policy_counts(recipe: Path, world: WorldPaths) -> None:
    judge = f"judge={{kind: preference_model, path: {world.base}}}"
    nash = check(recipe, ["trainer.algorithm=nash_mp", judge, "rollout.max_new_tokens=16"])
    parts = nash["memory"]["parts"]
    assert parts["judge"] == parts["weights"]
    assert parts["kept weights"] == 2 * parts["weights"]
    assert parts["sampling"] > 0
    missing = "judge={kind: reward_model, path: nowhere}"
    ppo = check(recipe, ["trainer.algorithm=ppo", missing, "rollout.max_new_tokens=16"])["memory"]
    assert ppo["notes"] == ["not counted: the judge, since nowhere is not there yet"]
    # weights, gradients and two moments in float32; the policy's head is its embeddings
    assert ppo["parts"]["critic"] == pytest.approx(4 * parts["weights"], rel=0.01)


def test_a_share_of_the_device_is_vllms(recipe: Path) -> None:
    from prefopt.memory import Machine, _rollout_bytes

    rollout = SimpleNamespace(engine="vllm", gpu_memory=0.3)
    machine = Machine(Spread(), True, "cuda", 1000)
    found = _rollout_bytes(SimpleNamespace(rollout=rollout), None, machine, None, 2)  # type: ignore[arg-type]
    assert found == {"vLLM": 300}
    rollout = SimpleNamespace(engine="vllm_server")
    found = _rollout_bytes(SimpleNamespace(rollout=rollout), None, machine, None, 2)  # type: ignore[arg-type]
    assert found == {}
    rollout = SimpleNamespace(engine="auto", gpu_memory=0.3)
    found = _rollout_bytes(SimpleNamespace(rollout=rollout), None, machine, None, 2)  # type: ignore[arg-type]
    assert found == {"vLLM": 300}, "which auto may choose"


def test_kept_weights_are_spread_as_the_policy_is() -> None:
    from prefopt.memory import _kept_bytes
    from prefopt.trainers.nash_mp import NashMPConfig

    recipe = SimpleNamespace(rollout=SimpleNamespace(samples_per_prompt=2))
    moving = NashMPConfig(output_dir="x", kappa=0.1, use_cpu=True)
    still = NashMPConfig(output_dir="x", kappa=1, use_cpu=True)
    one, eight = Spread("ddp", 8), Spread("fsdp2", 8)
    # 100 weights in bfloat16: the initial ones and a target, which is float32 as it moves
    assert _kept_bytes(moving, recipe, 100, 200, one) == 2 * 400  # type: ignore[arg-type]
    assert _kept_bytes(still, recipe, 100, 200, one) == 200  # type: ignore[arg-type]
    assert _kept_bytes(moving, recipe, 100, 200, eight) == 2 * 400 // 8  # type: ignore[arg-type]


def test_a_configuration_that_cannot_be_had_is_said(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(path: str, **options: Any) -> None:
        raise PrefoptError(f"model path {path!r}: no configuration could be loaded")

    monkeypatch.setattr("prefopt.memory.load_config", unreachable)
    result = check(recipe)
    assert "no configuration could be loaded" in result["memory"]["problem"]
    print_check(result)
    assert "no estimate of the memory" in capsys.readouterr().out
