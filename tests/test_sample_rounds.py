"""HyPO, Nash-MP, PPO and dataset-reset PPO on a tiny model, through the real trainers.

Many tokens of the model are stop tokens, so that answers differ in length and a normaliser that
counts the wrong tokens shows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from run_folders import contents
from test_rounds import (
    EVERY_RUN,
    PEAK,
    PROMPTS,
    SEED,
    TOKENIZER,
    TWO,
    Graded,
    Steps,
    Watched,
    brief_policy,
    equal,
    fine,
    logged,
    make_trainer,
    number,
    pair_of,
    samples,
    weights,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from prefopt.check import check
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.forward import enable_trees
from prefopt.models.load import load_reward_model
from prefopt.models.logprobs import sequence_log_probs, token_log_probs_of
from prefopt.reward_models import RewardModel, RuleJudge
from prefopt.reward_models.preference_model import PreferenceModel
from prefopt.rollout.engine import Completion, Done, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.log_probs import LogProbShards
from prefopt.rounds.resets import reset_length
from prefopt.rounds.store import Sample, read_lines
from prefopt.train import make_config, read_recipe, train
from prefopt.trainers import TRAINERS, base, critic, ppo
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.episodes import Episode, TokenReads, episode_columns
from prefopt.trainers.ppo import PPOConfig, PPOTrainer
from prefopt.trainers.rounds import RoundTrainer
from prefopt.world import WorldPaths, build_world

# a name for a test -> the algorithm and what is not its default
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "hypo": ("hypo", {"kl_weight": 0.1}),
    "ema": ("nash_mp", {}),
    "mirror_prox": ("nash_mp", {"mode": "mirror_prox", "phase_rounds": 1}),
    "ppo": ("ppo", {}),
    "drpo": ("drpo", {"reset_probability": 0.5}),
}
WITH_CRITIC = ("ppo", "drpo")
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


pytestmark = pytest.mark.usefixtures("frozen_heap")


Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes trainers by the name of a kind, each in a run folder."""

    def one(kind: str, run: str = "run", **options: Any) -> RoundTrainer:
        algorithm, defaults = KINDS[kind]
        settings = {"model": brief_policy(), "num_train_epochs": 1, **defaults, **options}
        return make_trainer(tmp_path / run, algorithm, **settings)

    return one


def drawn(trainer: RoundTrainer, index: int = 0) -> dict[int, list[Sample]]:
    return samples(trainer.rounds_dir / f"{index:04d}")


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in weights(model).items() if not torch.equal(value, before[name])}


def files_of_rounds(trainer: RoundTrainer) -> dict[str, bytes]:
    found = contents(trainer.rounds_dir)
    return {name: value for name, value in found.items() if "start.json" not in name}


# --- gradient accumulation -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eight_micro_batches_of_one_are_one_of_eight(make: Make, kind: str) -> None:
    """Rounds of 11 prompts, so that the second step of each pass has fillers: to 1e-5."""
    found = []
    for size in (8, 2, 1):
        trainer = make(
            kind,
            f"run-{size}",
            prompts_per_round=11,
            num_train_epochs=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        assert trainer.state.global_step == 6
        lengths = {len(s.completion.token_ids) for g in drawn(trainer).values() for s in g}
        assert len(lengths) > 3, "answers differ in length"
        found.append(trainer)
    whole = found[0]
    for trainer in found[1:]:
        assert drawn(trainer, 1) == drawn(whole, 1)
        for name in ("loss", "grad_norm"):
            expected = logged(whole, name)
            near = 1e-4 * max(map(abs, expected))  # Nash-MP's loss is a sum that may cancel
            assert logged(trainer, name) == pytest.approx(expected, abs=near)
        models = [(trainer.model, whole.model)]
        if kind in WITH_CRITIC:
            models.append((trainer.critic, whole.critic))
        for a, b in models:
            for name, value in weights(a).items():
                assert torch.allclose(value, weights(b)[name], rtol=0, atol=1e-5), name
    start, end = weights(brief_policy()), weights(whole.model)
    assert max((end[name] - start[name]).abs().max() for name in start) > 1e-3


class PerMicroBatch(PPOTrainer):
    """Divides by the tokens of a micro-batch, as is often done."""

    def tree_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        count = inputs["trees"].num_trees
        for name in ("own", "sampled"):
            inputs[f"mean_{name}"] = inputs[name].sum().item() / count
        return super().tree_losses(model, inputs)


def test_a_normaliser_of_micro_batches_would_not_pass_for_one_of_the_batch(make: Make) -> None:
    losses = []
    for size in (8, 1):
        trainer = make(
            "ppo",
            f"run-{size}",
            trainer_class=PerMicroBatch,
            prompts_per_round=8,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
        )
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert abs(losses[0] - losses[1]) > 1e-2


# --- adapters and references ---------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_to_be_trained_moves_and_nothing_else(make: Make, kind: str, adapter: Any) -> None:
    trainer = make(kind, rounds=4, peft_config=adapter, learning_rate=1e-2)
    models = [trainer.model] + ([trainer.critic] if kind in WITH_CRITIC else [])
    before = [weights(model) for model in models]
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-5, "the policy is its reference at first"
    assert abs(logged(trainer, "kl")[-1]) > 1e-4
    for model, start in zip(models, before, strict=True):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        if adapter is None:
            assert trained == {name for name, _ in model.named_parameters()}
        else:
            assert all("lora_" in name or "score" in name for name in trained)
        assert moved(model, start) == trained
    if kind in WITH_CRITIC:
        assert any("score" in name for name in trained), "an adapter alone would freeze the head"
    reads = token_log_probs_of if kind in WITH_CRITIC else sequence_log_probs
    initial = brief_policy()
    enable_trees(initial)
    with torch.no_grad():
        expected = reads(initial.eval(), collate_trees(trainer.dataset.trees))
    if kind in WITH_CRITIC:
        sizes = [sum(map(len, tree.completions)) for tree in trainer.dataset.trees]
        folder = trainer.rounds_dir / "0003" / "log_probs" / "initial"
        stored = torch.cat(LogProbShards(folder, sizes).load())
    else:
        stored = torch.cat(list(trainer.dataset.columns["reference"]))
    assert torch.allclose(stored, expected, atol=1e-4)


# --- HyPO ----------------------------------------------------------------------------------------


class Mute(RuleJudge):
    """A judge that nobody may ask."""

    def __init__(self) -> None:
        super().__init__(lambda **_: pytest.fail("the judge was asked"))


class Idle:
    """An engine that nobody may ask."""

    continuous = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        pytest.fail("something was sampled")


@pytest.mark.parametrize(
    ("offline", "rounds", "adapter"),
    [
        ({"lr_scheduler_type": "cosine"}, {}, None),
        ({"lr_scheduler_type": "linear", "gradient_accumulation_steps": 2}, {}, None),
        ({"num_train_epochs": 2}, {"steps_per_round": 3}, None),
        ({"loss_type": "ipo", "beta": 0.05}, {}, LORA),
    ],
    ids=["cosine", "accumulated", "two-passes", "lora"],
)
def test_without_a_kl_hypo_is_dpo(
    make: Make, tmp_path: Path, offline: dict[str, Any], rounds: dict[str, Any], adapter: Any
) -> None:
    """To the last bit, and without a word to judge or engine."""
    common = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, **offline}
    hybrid = make(
        "hypo",
        kl_weight=0.0,
        judge=Mute(),
        engine=Idle(),
        rounds=None,
        peft_config=adapter,
        **common,
        **rounds,
    )
    hybrid.train()
    settings = {**EVERY_RUN, "seed": SEED, **common}
    plain = DPOTrainer(
        brief_policy(),
        DPOConfig(output_dir=str(tmp_path / "dpo"), **settings),
        [pair_of(prompt) for prompt in PROMPTS[:12]],
        processing_class=TOKENIZER,
        peft_config=adapter,
    )
    plain.train()
    assert plain.state.global_step >= 2
    for name in ("loss", "grad_norm", "learning_rate", "rewards/margins", "length/chosen"):
        assert logged(hybrid, name) == logged(plain, name), name
    assert equal(weights(hybrid.model), weights(plain.model))
    assert moved(plain.model, weights(brief_policy())) if adapter is None else True
    assert not list(hybrid.rounds_dir.rglob("draw-*"))


def test_hypo_has_no_judge(tmp_path: Path) -> None:
    config, trainer_class = TRAINERS["hypo"]
    trainer = trainer_class(
        brief_policy(),
        config(output_dir=str(tmp_path), kl_weight=0.1, **EVERY_RUN),
        [pair_of(prompt) for prompt in PROMPTS[:4]],
        sampling=TWO,
        processing_class=TOKENIZER,
    )
    trainer.train()
    assert math.isfinite(logged(trainer, "loss")[-1])
    assert len(drawn(trainer)) == 4
    assert not list(trainer.rounds_dir.rglob("judgements-*"))


def test_a_judge_that_is_handed_to_hypo_is_not_asked(make: Make) -> None:
    make("hypo", judge=Mute()).train()


def test_the_kl_pulls_hypo_back_to_its_reference(make: Make) -> None:
    """The same steps on pairs, with and without the KL: with it, the policy stays nearer."""
    many = sampled_like(samples_per_prompt=16)
    options = {"rounds": 12, "prompts_per_round": 4, "learning_rate": 1e-2, "sampling": many}
    distances = []
    for run, weight in (("free", 1e-9), ("held", 1.0)):
        trainer = make("hypo", run, kl_weight=weight, **options)
        trainer.train()
        distances.append(np.mean(logged(trainer, "kl")[-4:]))
    assert distances[1] < distances[0] / 2


@pytest.mark.parametrize("kind", ["hypo", "drpo"])
def test_equal_prompts_of_a_batch_have_samples_of_their_own(make: Make, kind: str) -> None:
    other = {"chosen": "words please say", "rejected": "say please"}
    twice = [pair_of(PROMPTS[0]), {"prompt": PROMPTS[0], **other}]
    options = {"reset_probability": 0.0} if kind == "drpo" else {}
    trainer = make(kind, rows=twice, rounds=1, prompts_per_round=2, **options)
    trainer.train()
    groups = [[s.completion.token_ids for s in group] for group in drawn(trainer).values()]
    assert len(groups) == 2
    assert not {tuple(ids) for ids in groups[0]} & {tuple(ids) for ids in groups[1]}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("hypo", {}), ("drpo", {"reset_probability": 0.0}), ("ppo", {"offline_value_weight": 0.5})],
    ids=["hypo", "drpo", "ppo"],
)
def test_a_round_of_distinct_prompts_is_one_call_of_the_engine(
    make: Make, kind: str, options: dict[str, Any], parts: int
) -> None:
    """For each part of the samples, however often the data set repeats the prompts."""
    model = brief_policy()
    engine = Watched(model)
    trainer = make(
        kind,
        model=model,
        engine=engine,
        rows=[pair_of(prompt) for prompt in PROMPTS[:4] * 3],
        train_sampling_strategy="sequential",
        sampling=[TWO] * parts,
        rounds=3,
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    assert len(engine.calls) == 3
    for position in range(4):
        groups = [drawn(trainer, index)[position] for index in range(3)]
        answers = {tuple(s.completion.token_ids) for group in groups for s in group}
        assert len(answers) > 2 * parts, "another round, other noise"


@pytest.mark.parametrize("kind", ["hypo", "drpo"])
def test_a_prompt_that_a_round_repeats_has_another_seed(make: Make, kind: str) -> None:
    model = brief_policy()
    engine = Watched(model)
    options = {"reset_probability": 0.0} if kind == "drpo" else {}
    rows = [pair_of(PROMPTS[n]) for n in (0, 1, 0, 0)]
    make(kind, model=model, engine=engine, rows=rows, rounds=1, **options).train()
    [(_, settings)] = engine.calls
    assert len({own.seed for own in settings}) == 3


# --- what is said of samples and judges ----------------------------------------------------------


class Silent(TransformersEngine):
    """Does not say how probable its samples were."""

    def generate(self, *args: Any, done: Done, **kwargs: Any) -> list[list[Completion]]:
        def silenced(index: int, group: list[Completion]) -> None:
            done(index, [replace(answer, log_prob=math.nan) for answer in group])

        return super().generate(*args, done=silenced, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_may_keep_its_log_probs_to_itself(make: Make, kind: str) -> None:
    model = brief_policy()
    trainer = make(kind, model=model, engine=Silent(model, TOKENIZER))
    trainer.train()
    assert logged_steps(trainer, "sampler_gap") == []
    assert all(
        math.isfinite(value) for line in trainer.state.log_history for value in line.values()
    )


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [("hypo", {"kl_weight": 0.0}, 0), ("hypo", {}, 2), ("mirror_prox", {}, 4), ("ppo", {}, 2)],
)
def test_a_run_says_how_many_samples_it_draws(
    make: Make,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    options: dict[str, Any],
    count: int,
) -> None:
    caplog.set_level("INFO", logger="prefopt")
    make(kind, **options).train()
    [said] = [message for message in caplog.messages if " prompts x " in message]
    assert said.startswith(f"2 rounds of 4 prompts x {count} samples, 1 step(s) each")


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_of_a_judge_is_logged_where_there_is_one(make: Make, kind: str) -> None:
    trainer = make(kind)
    trainer.train()
    assert len(logged_steps(trainer, "time/generate")) == len(trainer.plan)
    asked = [] if kind == "hypo" else logged_steps(trainer, "time/generate")
    assert logged_steps(trainer, "time/judge") == asked


# --- the temperature and the age of samples ------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_the_sampling_temperature(make: Make, kind: str) -> None:
    cool = SamplingSettings(samples_per_prompt=2, max_new_tokens=6, temperature=0.7)
    trainer = make(kind, sampling=cool, **({"reset_probability": 0.2} if kind == "drpo" else {}))
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-5
    assert logged(trainer, "sampler_gap")[0] < 1e-4
    model = brief_policy()
    enable_trees(model)
    ids, planned = trainer.prompts.prompt_ids, trainer.plan[0].prompts
    own = [(p, s) for p, group in drawn(trainer).items() for s in group if not s.forced]
    if kind == "mirror_prox":  # the opponent is the policy, too, at first
        assert len(own) == 16
    said = torch.tensor([s.completion.log_prob for _, s in own])
    trees = [PromptTree(ids[planned[p]], [s.completion.token_ids]) for p, s in own]
    with torch.no_grad():
        cold, warm = (sequence_log_probs(model.eval(), collate_trees(trees), t) for t in (0.7, 1.0))
    assert torch.allclose(said, cold, atol=1e-4)
    assert not torch.allclose(said, warm, atol=0.1)


def test_margins_of_hypo_are_zero_at_first_at_any_temperature(make: Make) -> None:
    cool = SamplingSettings(samples_per_prompt=2, max_new_tokens=6, temperature=0.7)
    trainer = make("hypo", sampling=cool, beta=1.0, kl_weight=0.1)
    trainer.train()
    assert abs(logged(trainer, "rewards/margins")[0]) < 1e-4
    assert logged(trainer, "dpo_loss")[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_refreshed_and_their_age_is_logged(make: Make, kind: str) -> None:
    """12 prompts a round, 4 a step: three steps on samples of the policy before the first."""
    model, steps = brief_policy(), Steps()
    engine = Watched(model)
    trainer = make(
        kind,
        model=model,
        engine=engine,
        steps_per_round=3,
        prompts=PROMPTS,
        callbacks=[steps],
    )
    trainer.train()
    assert logged(trainer, "staleness") == [0, 1, 2, 0, 1, 2]
    assert logged(trainer, "round") == [0, 0, 0, 1, 1, 1]
    assert sorted(path.name for path in trainer.rounds_dir.glob("0*")) == ["0000", "0001"]
    assert [len(drawn(trainer, index)) for index in range(2)] == [12, 12]
    assert set(logged_steps(trainer, "sampler_gap")) == {1, 4}, "that of fresh samples"
    (first, _), (last, _) = engine.calls[0], engine.calls[-1]
    assert equal(first, steps.before[0])
    if kind != "mirror_prox":  # whose last call is the opponent's
        assert equal(last, steps.before[3])
        assert not equal(first, last)


def logged_steps(trainer: RoundTrainer, name: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


# --- resets --------------------------------------------------------------------------------------


def test_without_resets_drpo_is_ppo(make: Make) -> None:
    resets = make("drpo", "drpo", reset_probability=0.0, num_train_epochs=2)
    plain = make("ppo", "ppo", num_train_epochs=2)
    for trainer in (resets, plain):
        trainer.train()
    assert files_of_rounds(resets) == files_of_rounds(plain)
    assert logged(resets, "loss") == logged(plain, "loss")
    assert equal(weights(resets.model), weights(plain.model))
    assert equal(weights(resets.critic), weights(plain.critic))
    assert moved(plain.model, weights(brief_policy()))


def test_a_reset_forces_part_of_the_offline_answer(make: Make) -> None:
    heard: list[str] = []

    class Heard(Graded):
        def score(self, prompts: Any, completions: Any, **columns: Any) -> np.ndarray:
            heard.extend(completions)
            return super().score(prompts, completions)

    four = SamplingSettings(samples_per_prompt=4, max_new_tokens=6)
    trainer = make(
        "drpo",
        judge=Heard(fine),
        sampling=four,
        reset_probability=1.0,
        prompts=PROMPTS,
        rounds=1,
        prompts_per_round=24,
    )
    trainer.train()
    lengths = set()
    for position, group in drawn(trainer).items():
        answer = trainer.prompts.completion_ids[trainer.plan[0].prompts[position]]
        assert answer[-1] == TOKENIZER.eos_token_id
        for sample in group:
            ids = sample.completion.token_ids
            assert 1 <= sample.forced <= min(len(answer), 6) - 1
            assert ids[: sample.forced] == answer[: sample.forced]
            assert sample.forced < len(ids) <= 6
            whole = TOKENIZER.decode(ids, skip_special_tokens=True)
            assert sample.completion.text == whole
            assert whole in heard, "the judge reads the forced part, too"
            lengths.add(sample.forced)
    assert lengths == {1, 2, 3, 4, 5}
    assert len(heard) == 4 * len(drawn(trainer))


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_resets_are_counted(make: Make, probability: float) -> None:
    trainer = make("drpo", reset_probability=probability)
    trainer.train()
    names = ("rollout/reset", "rollout/forced")
    if not probability:
        assert not any(name in report_of(trainer) for name in names)
        assert logged_steps(trainer, "rollout/reset") == []
        return
    forced = [s.forced for group in drawn(trainer).values() for s in group]
    expected = [np.mean([n > 0 for n in forced]), np.mean(forced)]
    assert 0 < expected[0] < 1 < expected[1] + 1
    assert [report_of(trainer)[name] for name in names] == pytest.approx(expected)
    assert [logged(trainer, name)[0] for name in names] == pytest.approx(expected)


def test_resets_are_seeded(make: Make) -> None:
    def cuts(run: str, **options: Any) -> list[int]:
        trainer = make("drpo", run, reset_probability=0.5, **options)
        trainer.train()
        return [s.forced for k in range(2) for _, g in sorted(drawn(trainer, k).items()) for s in g]

    assert cuts("one") == cuts("again") == cuts("shards", prompts_per_shard=1)
    assert cuts("one") != cuts("other", seed=SEED + 1)


def lengths_of_resets(length: int, probability: float, limit: int = 50) -> Counter[int]:
    return Counter(
        reset_length(f"{n}", length, probability=probability, limit=limit) for n in range(4000)
    )


def test_a_reset_forces_each_number_of_tokens_but_none_and_all() -> None:
    # 4000 draws, p = 1/4: a standard deviation is sqrt(4000 x 1/4 x 3/4) = 27
    counts = lengths_of_resets(5, probability=1.0)
    assert counts.keys() == {1, 2, 3, 4}
    assert all(abs(count - 1000) < 4 * 27.4 for count in counts.values())


@pytest.mark.parametrize("length", [0, 1])
def test_an_answer_of_one_token_is_no_reset(length: int) -> None:
    assert lengths_of_resets(length, probability=1.0).keys() == {0}


def test_a_reset_takes_place_with_its_probability() -> None:
    # a standard deviation is sqrt(4000 x 0.3 x 0.7) = 29
    counts = lengths_of_resets(5, probability=0.3)
    assert abs(4000 - counts[0] - 1200) < 4 * 29
    assert lengths_of_resets(5, probability=0.0).keys() == {0}


def test_a_reset_leaves_room_under_the_limit() -> None:
    assert lengths_of_resets(9, probability=1.0, limit=4).keys() == {1, 2, 3}


def test_a_cut_is_a_function_of_its_key() -> None:
    def cut(key: str) -> int:
        return reset_length(key, 100, probability=1.0, limit=100)

    assert cut("a") == cut("a")
    assert len({cut(f"{n}") for n in range(50)}) > 20


def with_leaf(
    trainer: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """The policy's losses of a batch and their gradient by the log-prob of each token."""
    leaf = (inputs["old"] + 0.05).clone().requires_grad_(True)
    monkeypatch.setattr(ppo, "token_log_probs_of", lambda *_, **__: leaf)
    losses, _ = trainer._policy_losses(trainer.model, inputs["trees"], inputs)
    losses.sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def test_forced_tokens_teach_the_policy_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make("drpo", reset_probability=1.0, rounds=1)
    trainer.train()
    rows = np.arange(4)
    inputs = trainer.collate([trainer.dataset[int(row)] for row in rows])
    inputs |= trainer.batch_columns(rows)
    lengths, forced = inputs["trees"].lengths.tolist(), ~inputs["own"]
    expected = [s.forced for _, g in sorted(drawn(trainer).items()) for s in g]
    assert [int(part.sum()) for part in forced.split(lengths)] == expected
    losses, gradient = with_leaf(trainer, inputs, monkeypatch)
    assert (gradient[forced] == 0).all()
    assert (gradient[inputs["own"]] != 0).any()
    assert inputs["mean_own"] == (~forced).sum().item() / 4
    for name in ("old", "advantages"):
        inputs[name] = torch.where(forced, inputs[name] + 7.0, inputs[name])
    again, same = with_leaf(trainer, inputs, monkeypatch)
    assert torch.equal(again, losses)
    assert torch.equal(same, gradient)
    assert inputs["sampled"].all(), "the critic reads forced tokens, too"


def test_the_offline_answer_may_stand_in_another_column(make: Make) -> None:
    rows = [{**pair_of(prompt), "reference": "words : please say can you"} for prompt in PROMPTS]
    trainer = make("drpo", rows=rows, reset_column="reference", reset_probability=1.0)
    trainer.train()
    answer = TOKENIZER("words : please say can you")["input_ids"]
    for group in drawn(trainer).values():
        for sample in group:
            assert sample.forced >= 1
            assert sample.completion.token_ids[: sample.forced] == answer[: sample.forced]


def test_a_row_without_its_offline_answer_is_named(make: Make) -> None:
    rows = [{**pair_of(PROMPTS[0]), "reference": "words please"}, pair_of(PROMPTS[1])]
    with pytest.raises(PrefoptError, match=r"train_dataset:2.*reference"):
        make("drpo", rows=rows, reset_column="reference")


def test_a_reset_needs_no_more_context_than_an_answer_from_the_start(make: Make) -> None:
    """Prompt and answer limit fill the context exactly; forced tokens are part of the answer."""
    trainer = make("drpo", rounds=1, reset_probability=1.0)
    longest = max(map(len, trainer.prompts.prompt_ids))
    trainer.model.config.max_position_embeddings = longest + TWO.max_new_tokens
    trainer.train()
    assert trainer.state.global_step == 1


# --- what is refused -----------------------------------------------------------------------------


class Comparing(Graded):
    compares_only = True


@pytest.mark.parametrize("kind", WITH_CRITIC)
def test_a_judge_that_only_compares_cannot_teach_a_critic(make: Make, kind: str) -> None:
    with pytest.raises(PrefoptError, match="score of each answer by itself, but Comparing only"):
        make(kind, judge=Comparing(fine))
    preference_model = PreferenceModel.__new__(PreferenceModel)
    with pytest.raises(PrefoptError, match="but PreferenceModel only compares"):
        make(kind, judge=preference_model)


def test_a_judge_that_only_compares_is_enough_for_nash_mp(make: Make) -> None:
    for kind in ("ema", "mirror_prox"):
        make(kind, kind, judge=Comparing(fine)).train()


def sampled_like(**settings: Any) -> SamplingSettings:
    return SamplingSettings(**{"samples_per_prompt": 2, "max_new_tokens": 6} | settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (sampled_like(temperature=0), "rollout.temperature: found 0, expected"),
        ([sampled_like(), sampled_like(temperature=0.7)], "rollout.temperature: found 0.7"),
        (sampled_like(top_p=0.9), "top_p=0.9"),
        (sampled_like(top_k=5), "top_k=5"),
    ],
    ids=["greedy", "mixed", "top_p", "top_k"],
)
def test_samples_that_would_bias_the_gradient_are_refused(
    make: Make, kind: str, sampling: Any, message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        make(kind, sampling=sampling)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_is_enough_where_there_is_a_critic(make: Make, kind: str) -> None:
    one = sampled_like(samples_per_prompt=1)
    if kind in WITH_CRITIC:
        make(kind, sampling=one).train()
        return
    with pytest.raises(PrefoptError, match="samples_per_prompt: found 1, expected at least 2"):
        make(kind, sampling=one)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hypo", {"kl_weight": -0.1}, "kl_weight: found -0.1"),
        ("hypo", {"kl_weight": math.nan}, "kl_weight: found nan"),
        ("hypo", {"steps_per_round": 0}, "steps_per_round: found 0"),
        ("hypo", {"rows": [{"prompt": PROMPTS[0]}]}, "train_dataset:1"),
        ("ema", {"beta": -1.0}, "beta: found -1.0"),
        ("ema", {"prox": -1.0}, "prox: found -1.0"),
        ("ema", {"kappa": 1.5}, "kappa: found 1.5"),
        ("ema", {"mode": "nash_md"}, "mode: found 'nash_md'"),
        ("mirror_prox", {"phase_rounds": 0}, "phase_rounds: found 0"),
        ("mirror_prox", {"rounds": 3}, "rounds: found 3, expected a multiple of .* 2"),
        ("mirror_prox", {"rounds": 6, "phase_rounds": 2}, "multiple of .* 4"),
        ("mirror_prox", {"rounds": None, "phase_rounds": 2}, "rounds: found 3"),
        ("ppo", {"clip": 0.0}, "clip: found 0.0"),
        ("ppo", {"value_clip": -0.2}, "value_clip: found -0.2"),
        ("ppo", {"kl_coef": -0.1}, "kl_coef: found -0.1"),
        ("ppo", {"vf_coef": -0.1}, "vf_coef: found -0.1"),
        ("ppo", {"gae_lambda": 1.1}, "gae_lambda: found 1.1"),
        ("ppo", {"gae_gamma": -0.1}, "gae_gamma: found -0.1"),
        ("mirror_prox", {"rounds": 4, "max_steps": 3}, "max_steps: found 3, .* after 2, 4 opt"),
        (
            "mirror_prox",
            {"rounds": 8, "num_train_epochs": 2, "max_steps": 6},
            r"max_steps: found 6, .* after 4, 8, 12, \.\.\. opt",
        ),
        ("ppo", {"critic_warmup_rounds": -1}, "critic_warmup_rounds: found -1"),
        ("ppo", {"critic_warmup_rounds": 2}, "critic_warmup_rounds: found 2 of 2 rounds"),
        ("drpo", {"critic_warmup_rounds": 9}, "critic_warmup_rounds: found 9 of 2 rounds"),
        (
            "ppo",
            {"critic_warmup_rounds": 1, "max_steps": 1},
            "max_steps: found 1, all of them in critic_warmup_rounds=1, which take 1 steps",
        ),
        ("ppo", {"critic_learning_rate": -1e-3}, "critic_learning_rate: found -0.001"),
        ("ppo", {"critic_learning_rate": math.nan}, "critic_learning_rate: found nan"),
        ("ppo", {"offline_value_weight": -1.0}, "offline_value_weight: found -1.0"),
        (
            "ppo",
            {"offline_value_weight": 1.0, "rows": [{"prompt": PROMPTS[0]}]},
            "train_dataset:1.*chosen",
        ),
        ("drpo", {"reset_probability": 1.5}, "reset_probability: found 1.5"),
        ("drpo", {"reset_column": "prompt"}, "reset_column: found prompt"),
        (
            "drpo",
            {"reset_column": "reference", "offline_value_weight": 1.0},
            "offline_value_weight: found 1.0 with reset_column=reference",
        ),
    ],
)
def test_keys_with_wrong_values_are_refused(
    make: Make, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        make(kind, **options)


def test_rounds_that_would_end_in_a_half_step_are_left_out(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="prefopt")
    trainer = make("mirror_prox", rounds=None, prompts=PROMPTS[:20])
    trainer.train()
    assert len(trainer.plan) == 4, "of five rounds of 4 prompts"
    assert trainer.state.global_step == 4
    assert [m for m in caplog.messages if "left out" in m] == [
        "rounds left out, since they would end in a half step: 1"
    ]


@pytest.mark.parametrize("kind", ["ema", "mirror_prox"])
def test_a_limit_on_steps_may_end_a_whole_step(make: Make, kind: str) -> None:
    trainer = make(kind, rounds=4, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


# --- the critic ----------------------------------------------------------------------------------


def test_a_critic_is_warmed_up_on_a_policy_that_stands_still(make: Make) -> None:
    critics: list[dict[str, Tensor]] = []

    class Noted(Steps):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.after.append(weights(kwargs["model"]))
            critics.append(weights(trainer.critic))

    steps = Noted()
    trainer = make("ppo", rounds=4, critic_warmup_rounds=2, num_train_epochs=2, callbacks=[steps])
    start = [weights(trainer.model), weights(trainer.critic)]
    trainer.train()
    assert len(steps.after) == 8, "two steps a round"
    assert all(equal(after, start[0]) for after in steps.after[:4])
    assert not any(equal(after, start[0]) for after in steps.after[4:])
    trail = [start[1], *critics]
    assert not any(equal(a, b) for a, b in pairwise(trail))
    assert logged(trainer, "grad_norm")[:4] == [0.0] * 4
    assert min(logged(trainer, "grad_norm")[4:]) > 0


def test_warm_up_teaches_the_critic_what_the_prompt_foretells(make: Make) -> None:
    """The score is a function of the prompt: a critic that has learnt it explains all of it."""
    judge = RuleJudge(
        lambda prompts, completions: [float(number(json.dumps(p)) % 2) for p in prompts]
    )
    trainer = make(
        "ppo",
        judge=judge,
        prompts=PROMPTS[:4],
        prompts_per_round=4,
        rounds=41,
        critic_warmup_rounds=40,
        critic_learning_rate=3e-3,
        kl_coef=0.0,
        missing_eos_score=None,
        whiten_rewards=False,
        gae_lambda=1.0,
        value_clip=10.0,
    )
    assert {number(json.dumps(p)) % 2 for p in PROMPTS[:4]} == {0, 1}
    trainer.train()
    explained = logged(trainer, "explained_variance")
    assert explained[0] == pytest.approx(0, abs=1e-6), "a critic of zeros"
    assert explained[-1] > 0.8
    assert np.mean(explained[-5:]) > np.mean(explained[10:20]) > np.mean(explained[:5])


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_weight_decay_of_the_critic_spares_its_norms(make: Make, adapter: Any) -> None:
    trainer = make("ppo", weight_decay=0.1, critic_learning_rate=0.5, peft_config=adapter)
    groups = trainer.create_optimizer().param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    decays = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trained = {name: p for name, p in trainer.critic.named_parameters() if p.requires_grad}
    assert {name: decays[id(p)] for name, p in trained.items()} == {
        name: "norm" not in name for name in trained
    }
    assert any("norm" in name for name in trained) == (adapter is None)
    assert {rates[id(p)] for p in trained.values()} == {0.5}
    assert {rates[id(p)] for p in trainer.model.parameters() if p.requires_grad} == {PEAK}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))


def test_norms_of_the_critic_stand_still_under_weight_decay_alone(make: Make) -> None:
    """Decoupled decay at rate 1/2 x 1/2 a step, with gradients of the critic that weigh nothing."""
    trainer = make("ppo", vf_coef=0.0, weight_decay=0.5, critic_learning_rate=0.5, max_steps=1)
    before = weights(trainer.critic)
    trainer.train()
    for name, value in weights(trainer.critic).items():
        assert torch.allclose(value, before[name] * (1.0 if "norm" in name else 0.75)), name


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_the_critic_computes_in_the_precision_of_the_policy(make: Make, adapter: Any) -> None:
    trainer = make("ppo", bf16=True, peft_config=adapter, num_train_epochs=1)
    seen: dict[str, set[torch.dtype]] = {"policy": set(), "critic": set()}

    def note(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen[name].add(output.dtype)

    for name, model in (("policy", trainer.model), ("critic", trainer.critic)):
        layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
        layer.register_forward_hook(note(name))
    trainer.train()
    assert seen == {"policy": {torch.bfloat16}, "critic": {torch.bfloat16}}
    assert {p.dtype for p in trainer.critic.parameters()} == {torch.float32}
    assert {column.dtype for column in trainer.dataset.columns["values"]} == {torch.float32}


def test_the_critic_is_wrapped_once(make: Make) -> None:
    trainer = make("ppo", bf16=True, save_strategy="steps", save_steps=1)
    plain = trainer.critic.forward
    trainer.train()
    wrapped = trainer.critic.forward
    assert wrapped != plain
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.critic.forward is wrapped
    with pytest.raises(PrefoptError, match="was called before"):
        trainer.train()


@pytest.mark.parametrize(
    ("layout", "wrong", "asked", "found"),
    [
        ("auto", None, ["policy", "critic"], "tree"),
        ("auto", "critic", ["policy", "critic"], "separate"),
        ("auto", "policy", ["policy"], "separate"),
        ("tree", "critic", [], "tree"),
        ("separate", None, [], "separate"),
    ],
)
def test_trees_are_used_where_policy_and_critic_both_read_them(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    wrong: str | None,
    asked: list[str],
    found: str,
) -> None:
    names: list[str] = []

    def agrees(model: nn.Module, trees: Any, dtype: torch.dtype) -> bool:
        assert not model.training
        names.append({id(trainer.model): "policy", id(trainer.critic): "critic"}[id(model)])
        return names[-1] != wrong

    def layout_for(*args: Any) -> str:
        return "tree" if agrees(*args) else "separate"

    monkeypatch.setattr(base, "layout_for", layout_for)
    monkeypatch.setattr(critic, "values_agree", agrees)
    trainer = make("ppo", layout=layout, rounds=2)
    trainer.train()
    assert (names, trainer.layout) == (asked, found)


def test_offline_answers_teach_the_critic_alone(make: Make) -> None:
    heard: list[str] = []

    class Heard(Graded):
        def score(self, prompts: Any, completions: Any, **columns: Any) -> np.ndarray:
            heard.extend(completions)
            return super().score(prompts, completions)

    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
    plain = make("ppo", "plain", judge=Graded(fine), **options)
    both = make("ppo", "both", judge=Heard(fine), offline_value_weight=1.0, **options)
    for trainer in (plain, both):
        trainer.train()
    assert drawn(both) == drawn(plain)
    assert logged(both, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-5)
    for name, value in weights(plain.model).items():
        assert torch.allclose(weights(both.model)[name], value, rtol=0, atol=1e-6)
    score = "score.weight"
    assert not torch.allclose(weights(both.critic)[score], weights(plain.critic)[score], atol=1e-3)
    rows = [pair_of(PROMPTS[row]) for row in both.plan[0].prompts]
    assert {row[column] for row in rows for column in ("chosen", "rejected")} <= set(heard)
    # the target at an offline answer's last token is its score, in the unit of the samples' rewards
    rewards = [
        (score if sample.completion.finish_reason == "stop" else -1.0) * last
        for position, group in drawn(both).items()
        for sample, score in zip(group, judgements(both)[position]["scores"], strict=False)
        for last in [0] * (len(sample.completion.token_ids) - 1) + [1]
    ]
    unit = np.sqrt(np.mean(np.square(rewards)))
    assert abs(unit - 1) > 0.1
    for index, row in enumerate(rows):
        lengths = [len(ids) for ids in both.dataset.trees[index].completions]
        returns = both.dataset.columns["returns"][index].split(lengths)
        offline = both.dataset.columns["offline"][index].split(lengths)
        assert [bool(part.all()) for part in offline] == [True, True, False, False]
        for part, column in zip(returns, ("chosen", "rejected"), strict=False):
            assert part[-1].item() == pytest.approx(fine(row[column]) / unit, rel=1e-4)
            assert part[:-1].abs().max() < 1e-5, "before that the next value, which is 0 at first"
    mean_score = np.mean([s for line in judgements(both) for s in line["scores"][:2]])
    assert report_of(both)["judge/score"] == pytest.approx(mean_score)


def judgements(trainer: RoundTrainer) -> list[dict[str, Any]]:
    return read_lines(trainer.rounds_dir / "0000" / "draw-0" / "judgements-00000.jsonl")


def report_of(trainer: RoundTrainer) -> dict[str, Any]:
    return read_lines(trainer.rounds_dir / "0000" / "round.json")[0]


def plain_numbers(**options: Any) -> SimpleNamespace:
    defaults = {
        "kl_coef": 0.5,
        "whiten_rewards": False,
        "whiten_advantages": False,
        "gae_gamma": 1.0,
        "gae_lambda": 1.0,
        "mask_padding": True,
    }
    return SimpleNamespace(**defaults | options)


READS = TokenReads(
    policy=[torch.tensor([-1.0, -2.0, -3.0])],
    reference=[torch.tensor([-1.5, -2.0, -4.0])],
    values=[torch.tensor([0.1, 0.2, 0.3])],
)


def test_padding_that_counts_is_rewarded_like_any_token() -> None:
    """An answer of two tokens, padded to three, score 2.

    rewards  -0.5 x 0.5 = -0.25;  2 - 0.5 x 0 = 2;  padding -0.5 x 1 = -0.5
    returns  their sums from here on: 1.25, 1.5, -0.5
    """
    trees = [PromptTree([5, 6], [[7, 8, 0]])]
    args = plain_numbers(mask_padding=False)
    columns, facts = episode_columns(trees, [Episode(2, 2.0)], READS, args)
    assert columns["returns"][0].tolist() == pytest.approx([1.25, 1.5, -0.5])
    assert columns["advantages"][0].tolist() == pytest.approx([1.15, 1.3, -0.8])
    assert columns["own"][0].tolist() == [True, True, True]
    assert columns["sampled"][0].tolist() == [True, True, True]
    assert (facts["reward"], facts["length/mean"]) == (2.0, 2.0)
    # over the two tokens that are the policy's: (-1 + 1.5) + (-2 + 2), (1 + 2) / 2
    assert facts["kl"] == pytest.approx(0.5)
    assert facts["entropy"] == pytest.approx(1.5)


def test_forced_tokens_have_returns_and_are_not_the_policys() -> None:
    trees = [PromptTree([5, 6], [[7, 8, 9]])]
    columns, _ = episode_columns(trees, [Episode(3, 2.0, forced=1)], READS, plain_numbers())
    # rewards -0.25, 0, 2 - 0.5 = 1.5
    assert columns["returns"][0].tolist() == pytest.approx([1.25, 1.5, 1.5])
    assert columns["own"][0].tolist() == [False, True, True]
    assert columns["sampled"][0].tolist() == [True, True, True]


def test_rewards_are_divided_by_their_size() -> None:
    """rewards (-0.25, 0, 1.5), root mean square 0.87797; with lambda 0 an advantage is a delta."""
    trees = [PromptTree([5, 6], [[7, 8, 9]])]
    args = plain_numbers(whiten_rewards=True, gae_lambda=0.0)
    columns, _ = episode_columns(trees, [Episode(3, 2.0)], READS, args)
    scaled = [r / 0.8779712 for r in (-0.25, 0.0, 1.5)]
    deltas = [scaled[0] + 0.2 - 0.1, scaled[1] + 0.3 - 0.2, scaled[2] - 0.3]
    assert columns["advantages"][0].tolist() == pytest.approx(deltas, rel=1e-5)


def test_where_padding_counts_rewards_keep_their_mean() -> None:
    """The same rewards have the mean 0.41667 and the deviation 0.77280."""
    trees = [PromptTree([5, 6], [[7, 8, 9]])]
    args = plain_numbers(whiten_rewards=True, gae_lambda=0.0, mask_padding=False)
    columns, _ = episode_columns(trees, [Episode(3, 2.0)], READS, args)
    scaled = [(r - 0.4166667) / 0.7728015 + 0.4166667 for r in (-0.25, 0.0, 1.5)]
    deltas = [scaled[0] + 0.2 - 0.1, scaled[1] + 0.3 - 0.2, scaled[2] - 0.3]
    assert columns["advantages"][0].tolist() == pytest.approx(deltas, rel=1e-5)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    trees = [PromptTree([5, 6], [[7, 8, 9]])]
    args = plain_numbers(whiten_advantages=True)
    columns, _ = episode_columns(trees, [Episode(3, 2.0)], READS, args)
    advantages = columns["advantages"][0]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert (advantages**2).mean().item() == pytest.approx(1, rel=1e-5)


def of_lengths(
    lengths: Sequence[int], seed: int | None = None
) -> tuple[list[PromptTree], TokenReads]:
    """A tree for each answer with its numbers: random ones, or no KL and values of 0."""
    trees = [PromptTree([5, 6], [[7] * length]) for length in lengths]
    noise = torch.Generator().manual_seed(seed or 0)
    rows = [
        [torch.randn(length, generator=noise) - 3 if seed else torch.zeros(length) for _ in "prv"]
        for length in lengths
    ]
    policy, reference, values = (list(column) for column in zip(*rows, strict=True))
    return trees, TokenReads(policy, reference, values)


def test_answers_of_any_length_and_equal_score_are_worth_the_same() -> None:
    """Of 100 tokens, 4 have the reward 2: root mean square sqrt(4 x 4 / 100) = 0.4; 2 / 0.4."""
    lengths = [10, 20, 30, 40]
    trees, reads = of_lengths(lengths)
    episodes = [Episode(length, 2.0) for length in lengths]
    columns, _ = episode_columns(trees, episodes, reads, plain_numbers(whiten_rewards=True))
    firsts = [returns[0].item() for returns in columns["returns"]]
    assert firsts == pytest.approx([5.0] * 4, rel=1e-5)


def test_padding_that_counts_has_the_numbers_of_the_padded_code() -> None:
    """KL on every token, score at the last real one, all whitened but for the mean, lambda 0.9."""
    lengths, width = [2, 5, 3, 6], 6
    trees, reads = of_lengths([width] * 4, seed=1)
    scores = [1.0, -2.0, 0.5, 3.0]
    episodes = [Episode(length, score) for length, score in zip(lengths, scores, strict=True)]
    args = plain_numbers(
        whiten_rewards=True, whiten_advantages=True, gae_lambda=0.9, mask_padding=False
    )
    columns, _ = episode_columns(trees, episodes, reads, args)
    policy, reference, values = (
        torch.stack(list(column)).double().numpy()
        for column in (reads.policy, reads.reference, reads.values)
    )
    rewards = -0.5 * (policy - reference)
    for row, (length, score) in enumerate(zip(lengths, scores, strict=True)):
        rewards[row, length - 1] += score
    rewards = (rewards - rewards.mean()) / rewards.std() + rewards.mean()
    advantages, later = np.zeros_like(rewards), np.zeros(4)
    for t in reversed(range(width)):
        following = values[:, t + 1] if t + 1 < width else 0
        later = rewards[:, t] + following - values[:, t] + 0.9 * later
        advantages[:, t] = later
    assert torch.stack(columns["returns"]).numpy() == pytest.approx(advantages + values, abs=1e-5)
    whitened = (advantages - advantages.mean()) / advantages.std()
    assert torch.stack(columns["advantages"]).numpy() == pytest.approx(whitened, abs=1e-5)


def test_offline_targets_are_one_step_returns_in_the_unit_of_the_samples() -> None:
    """The sample's rewards (-0.25, 0, 1.5) have the root mean square 0.87797.

    Those of the offline answer, -0.5 x (-1 + 2) = -0.5 and 4 - 0.5 x (-2 + 1) = 4.5, are divided
    by it, too, and move it not; to the first one the next value, 0.7, is added.
    """
    trees = [PromptTree([5, 6], [[7, 8], [7, 8, 9]])]
    reads = TokenReads(
        policy=[torch.tensor([-1.0, -2.0, -1.0, -2.0, -3.0])],
        reference=[torch.tensor([-2.0, -1.0, -1.5, -2.0, -4.0])],
        values=[torch.tensor([0.6, 0.7, 0.1, 0.2, 0.3])],
    )
    episodes = [Episode(2, 4.0, offline=True), Episode(3, 2.0)]
    columns, facts = episode_columns(trees, episodes, reads, plain_numbers(whiten_rewards=True))
    rewards = [r / 0.8779712 for r in (-0.5, 4.5, -0.25, 0.0, 1.5)]
    expected = [rewards[0] + 0.7, rewards[1], sum(rewards[2:]), sum(rewards[3:]), rewards[4]]
    assert columns["returns"][0].tolist() == pytest.approx(expected, rel=1e-5)
    assert (facts["reward"], facts["length/mean"]) == (2.0, 3.0), "of samples alone"
    assert facts["kl"] == pytest.approx(1.5)
    assert facts["entropy"] == pytest.approx(2.0)


def test_what_is_said_of_a_round_is_said_of_the_tokens_that_were_drawn() -> None:
    """The second sample's first token is forced; the sampler said -5.2 of the other two.

    kl (0.5 + 0 + 1 and 0 + 1) / 2, entropy (1 + 2 + 3 + 2 + 3) / 5, gap |-5 + 5.2| / 2.
    """
    trees = [PromptTree([5, 6], [[7, 8, 9], [7, 8, 9]])]
    reads = TokenReads(
        *([torch.cat(list(column) * 2)] for column in (READS.policy, READS.reference)),
        values=[torch.zeros(6)],
    )
    episodes = [Episode(3, 2.0), Episode(3, 1.0, forced=1, log_prob=-5.2)]
    columns, facts = episode_columns(trees, episodes, reads, plain_numbers())
    expected = {"reward": 1.5, "kl": 1.25, "entropy": 2.2, "length/mean": 3.0, "sampler_gap": 0.1}
    assert facts == pytest.approx({**expected, "explained_variance": 0.0}, abs=1e-6)
    assert columns.keys() == {
        "old", "values", "advantages", "returns", "own", "sampled", "offline"
    }  # fmt: skip


def test_what_cannot_be_said_of_a_round_is_left_out() -> None:
    """A sampler that gives no log-probs, and returns that are all the same."""
    trees, reads = of_lengths([1, 1])
    _, facts = episode_columns(trees, [Episode(1, 2.0)] * 2, reads, plain_numbers())
    assert facts.keys() == {"reward", "kl", "entropy", "length/mean"}


@pytest.mark.parametrize("kind", WITH_CRITIC)
def test_a_round_is_described_once_as_it_begins(make: Make, kind: str) -> None:
    trainer = make(kind, steps_per_round=2, num_train_epochs=2, prompts=PROMPTS[:16])
    trainer.train()
    assert trainer.state.global_step == 8
    for name in ("kl", "entropy", "length/mean", "reward", "explained_variance", "sampler_gap"):
        assert logged_steps(trainer, name) == [1, 5], name
    assert logged_steps(trainer, "policy_loss") == logged_steps(trainer, "staleness")
    assert len(logged(trainer, "policy_loss")) == 8
    found = [s.completion for group in drawn(trainer).values() for s in group]
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["length/mean"] == np.mean([len(answer.token_ids) for answer in found])
    path = trainer.rounds_dir / "0000" / "draw-0" / "judgements-00000.jsonl"
    scores = [score for line in read_lines(path) for score in line["scores"]]
    paid = [s if a.finish_reason == "stop" else -1 for s, a in zip(scores, found, strict=True)]
    assert first["reward"] == pytest.approx(np.mean(paid))
    assert abs(first["kl"]) < 1e-5
    assert first["sampler_gap"] < 1e-4


@pytest.mark.parametrize(
    ("mask_padding", "tokens", "reason", "score"),
    [
        (True, 6, "stop", 2.0),
        (True, 6, "length", -1.0),
        (True, 4, "stop", 2.0),
        (False, 6, "stop", -1.0),  # the code of DR-PO looks for padding behind the EOS
        (False, 4, "stop", 2.0),
    ],
)
def test_an_answer_that_did_not_end_is_not_worth_its_score(
    make: Make, mask_padding: bool, tokens: int, reason: Any, score: float
) -> None:
    trainer = make("ppo", mask_padding=mask_padding, sampling=sampled_like(samples_per_prompt=1))
    sample = Sample(Completion([9] * tokens, "", reason), 1.0)
    tree = trainer.make_tree(0, [sample])
    assert [len(ids) for ids in tree.completions] == [tokens if mask_padding else 6]
    assert tree.completions[0][tokens:] == [TOKENIZER.pad_token_id] * (6 - tokens) * (
        not mask_padding
    )
    [episode] = trainer.episodes(tree, [sample], [2.0])
    assert (episode.score, episode.length) == (score, tokens)


def test_the_judges_score_counts_where_nothing_replaces_it(make: Make) -> None:
    trainer = make("ppo", missing_eos_score=None, sampling=sampled_like(samples_per_prompt=1))
    sample = Sample(Completion([9] * 6, "", "length"), 1.0)
    [episode] = trainer.episodes(trainer.make_tree(0, [sample]), [sample], [2.0])
    assert episode.score == 2.0


@pytest.mark.parametrize("kind", WITH_CRITIC)
def test_padding_may_count(make: Make, kind: str) -> None:
    """Metrics are over real tokens all the same."""
    trainer = make(kind, mask_padding=False, num_train_epochs=2)
    trainer.train()
    found = drawn(trainer)
    assert any(len(s.completion.token_ids) < 6 for group in found.values() for s in group)
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first["kl"]) < 1e-5
    means = [len(s.completion.token_ids) for group in found.values() for s in group]
    assert first["length/mean"] == pytest.approx(np.mean(means))


# --- Nash-MP -------------------------------------------------------------------------------------


def test_the_target_follows_the_policy_at_its_rate(make: Make) -> None:
    steps = Steps()
    trainer = make("ema", rounds=3, kappa=0.25, callbacks=[steps])
    target = weights(trainer.model)
    trainer.train()
    for after in steps.after:
        target = {name: 0.75 * value + 0.25 * after[name] for name, value in target.items()}
    kept = trainer.kept["target"]
    assert len(steps.after) == 3
    for name, value in kept.items():
        assert torch.allclose(value, target[name], rtol=0, atol=1e-6)
    assert logged(trainer, "kl_target")[0] == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "kl_target")[-1] != logged(trainer, "kl")[-1]


@pytest.mark.parametrize(("kappa", "keeps"), [(0.0, ()), (1.0, ()), (0.5, ("target",))])
def test_a_target_is_kept_where_it_is_neither_policy_nor_reference(
    make: Make, kappa: float, keeps: tuple[str, ...]
) -> None:
    trainer = make("ema", kappa=kappa, rounds=3)
    trainer.train()
    assert trainer.keeps == keeps
    names = {path.name for path in trainer.rounds_dir.glob("0002/log_probs/*")}
    assert names == {"initial", *keeps}
    if kappa == 0:
        assert logged(trainer, "kl_target") == logged(trainer, "kl")


def test_each_phase_of_mirror_prox_begins_where_the_first_did(make: Make) -> None:
    """Phases of two rounds, a step each: steps 0-1 and 2-3 both begin at the initial policy."""
    model, steps = brief_policy(), Steps()
    engine = Watched(model)
    trainer = make(
        "mirror_prox",
        model=model,
        engine=engine,
        rounds=8,
        phase_rounds=2,
        callbacks=[steps],
        prompts_per_round=4,
    )
    start = weights(trainer.model)
    trainer.train()
    assert len(steps.before) == 8
    assert equal(steps.before[0], start)
    assert equal(steps.before[2], start)
    assert equal(steps.before[4], steps.after[3])
    assert equal(steps.before[6], steps.after[3])
    assert not equal(steps.after[1], steps.after[3])
    own = [found for found, _ in engine.calls[0::2]]
    opponents = [found for found, _ in engine.calls[1::2]]
    assert [s[0].first_sample for _, s in engine.calls] == [0, 2] * 8
    assert all(equal(a, b) for a, b in zip(own, steps.before, strict=True))
    target, half = start, steps.after[1]
    assert equal(opponents[0], target)
    assert equal(opponents[1], target)
    assert equal(opponents[2], half)
    assert equal(opponents[3], half)
    assert equal(opponents[4], steps.after[3])
    assert equal(opponents[6], steps.after[5])
    assert steps.adam == [1, 2, 1, 2, 1, 2, 1, 2], "a phase has an optimiser of its own"


# --- recipes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=1, preference_rows=16, prompt_rows=1)


@pytest.fixture(scope="module")
def reward_model(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge") / "reward_model"
    load_reward_model(str(world.base), TOKENIZER, new_head=True).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def test_the_log_says_what_the_critic_begins_as(
    make: Make, reward_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="prefopt")
    make("ppo", "rule")
    make("ppo", "model", judge=RewardModel.from_pretrained(str(reward_model)))
    given = load_reward_model(str(reward_model), TOKENIZER)
    PPOTrainer(
        brief_policy(),
        PPOConfig(output_dir="unused", **EVERY_RUN),
        [{"prompt": prompt} for prompt in PROMPTS[:4]],
        judge=Graded(fine),
        critic=given,
        processing_class=TOKENIZER,
    )
    assert [m for m in caplog.messages if "critic begins" in m] == [
        "the critic begins as the policy's trunk, values of 0",
        "the critic begins as the judge",
    ], "and of one that is handed in, nothing"


@pytest.fixture
def recipe(world: WorldPaths, reward_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        model: {{path: {world.base}}}
        data: {{path: {world.preferences}}}
        judge: {{kind: reward_model, path: {reward_model}}}
        rollout: {{samples_per_prompt: 2, max_new_tokens: 5, batch_size: 32}}
        run_dir: {tmp_path}/run
        trainer:
          algorithm: dpo
          rounds: 2
          num_train_epochs: 1
          per_device_train_batch_size: 4
          learning_rate: 1.0e-3
          logging_steps: 1
        """
    )
    return path


@pytest.mark.parametrize(
    "algorithm", ["dpo", "online_dpo", "hypo", "inpo", "nash_mp", "drpo", "ppo"]
)
def test_the_algorithm_alone_is_switched(recipe: Path, tmp_path: Path, algorithm: str) -> None:
    summary = train(read_recipe(recipe, [f"trainer.algorithm={algorithm}"]))
    assert summary["algorithm"] == algorithm
    # one pass over 16 rows; or 2 rounds, by default of 8 prompts or of a batch
    assert summary["steps"] == (4 if algorithm in ("dpo", "online_dpo", "inpo") else 2)
    final = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert all(value.isfinite().all() for value in final.state_dict().values())
    assert len(summary.get("rounds", [])) == (2 if algorithm in ("online_dpo", "inpo") else 0)


@pytest.mark.parametrize("algorithm", WITH_CRITIC)
def test_a_recipe_with_a_judge_that_only_compares_is_refused(
    recipe: Path, world: WorldPaths, tmp_path: Path, algorithm: str
) -> None:
    judge = f"judge={{kind: preference_model, path: {world.base}}}"
    options = [f"trainer.algorithm={algorithm}", judge]
    with pytest.raises(PrefoptError, match="preference_model") as error:
        make_config(read_recipe(recipe, options))
    assert algorithm in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["hypo", "nash_mp", "ppo", "drpo"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("rollout.temperature=0", "rollout.temperature: found 0"),
        ("rollout.mix=[{temperature: 1.0}, {temperature: 0.7}]", "rollout.temperature: found 0.7"),
        ("rollout.top_p=0.9", "top_p=0.9"),
        ("rollout.top_k=3", "top_k=3"),
    ],
)
def test_a_recipe_whose_samples_would_bias_the_gradient_is_refused(
    recipe: Path, algorithm: str, option: str, message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        make_config(read_recipe(recipe, [f"trainer.algorithm={algorithm}", option]))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["trainer.algorithm=hypo", "trainer.kl_weight=0"], 0),
        (["trainer.algorithm=hypo", "trainer.kl_weight=0.1"], 2),
        (["trainer.algorithm=nash_mp"], 2),
        (["trainer.algorithm=nash_mp", "trainer.mode=mirror_prox", "trainer.phase_rounds=1"], 4),
        (["trainer.algorithm=ppo"], 2),
        (["trainer.algorithm=drpo", "rollout.samples_per_prompt=3"], 3),
    ],
)
def test_check_counts_the_samples_that_will_be_drawn(
    recipe: Path, tmp_path: Path, options: list[str], count: int
) -> None:
    assert check(recipe, options)["samples"] == count
    train(read_recipe(recipe, options))
    groups = samples(tmp_path / "run" / "rounds" / "0000")
    assert {len(group) for group in groups.values()} == ({count} if count else set())


def test_check_refuses_a_warm_up_without_an_end(recipe: Path) -> None:
    options = ["trainer.algorithm=ppo", "trainer.critic_warmup_rounds=2"]
    [error] = [f for f in check(recipe, options)["findings"] if f["severity"] == "error"]
    assert "critic_warmup_rounds: found 2 of 2 rounds" in error["found"]


def test_a_recipe_for_hypo_needs_no_judge(recipe: Path) -> None:
    summary = train(read_recipe(recipe, ["trainer.algorithm=hypo", "judge=null"]))
    assert summary["steps"] == 2


def test_a_critic_begins_as_the_reward_model(
    recipe: Path, reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    begin = PPOTrainer.before_training

    def noted(self: Any, resumed: bool) -> None:
        seen.append(weights(self.critic))
        begin(self, resumed)

    monkeypatch.setattr(PPOTrainer, "before_training", noted)
    train(read_recipe(recipe, ["trainer.algorithm=ppo"]))
    judge = load_reward_model(str(reward_model), TOKENIZER)
    assert equal(seen[0], weights(judge))
