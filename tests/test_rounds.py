"""Training in rounds on a tiny model: what is sampled from what, kept where, trained on how often.

The judge is a rule on the text, so that every claim about pairs can be counted again from disk.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sharpen
from peft import LoraConfig
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from prefopt.check import check
from prefopt.data.rows import Prompt, parse_pair
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.models.forward import enable_trees
from prefopt.models.load import load_reward_model
from prefopt.models.logprobs import sequence_log_probs
from prefopt.reward_models import RuleJudge
from prefopt.rollout.engine import Completion, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.log_probs import LogProbShards
from prefopt.rounds.pairs import read_pairs
from prefopt.rounds.plan import plan_rounds
from prefopt.rounds.store import Sample, read_lines, read_rollouts
from prefopt.train import read_recipe, train
from prefopt.trainers import TRAINERS, reference
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.online_dpo import OnlineDPOTrainer
from prefopt.trainers.round_config import schedule
from prefopt.trainers.rounds import RoundTrainer
from prefopt.world import WorldPaths, build_world
from prefopt.world.grammar import draw_prompt
from prefopt.world.tokenizer import world_tokenizer

TOKENIZER = world_tokenizer()
SEED = 3
PEAK = 1e-2
TWO = SamplingSettings(samples_per_prompt=2, max_new_tokens=6)
EVERY_RUN: dict[str, Any] = {
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": PEAK,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_train_epochs": 2,
}


def distinct_prompts(count: int) -> list[Prompt]:
    source = Random(0)
    prompts: dict[str, Prompt] = {}
    while len(prompts) < count:
        prompt = draw_prompt(source)
        prompts[json.dumps(prompt)] = prompt
    return list(prompts.values())


PROMPTS = distinct_prompts(24)
STOPS = [TOKENIZER.eos_token_id, *range(8, len(TOKENIZER), 5)]
WORDS = [TOKENIZER.decode(i) for i in range(8, len(TOKENIZER) - 20) if i not in STOPS]


def pair_of(prompt: Prompt) -> dict[str, Any]:
    """A row with two offline answers of one to eight words, which depend on the prompt alone."""
    source = Random(json.dumps(prompt))
    words = [source.sample(WORDS, source.randint(1, 8)) for _ in range(2)]
    return {"prompt": prompt, "chosen": " ".join(words[0]), "rejected": " ".join(words[1])}


def tiny_policy(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return sharpen(LlamaForCausalLM(config), 3.0)


def brief_policy() -> LlamaForCausalLM:
    """A tiny policy whose answers differ in length: a fifth of its tokens end them."""
    model = tiny_policy()
    model.generation_config.eos_token_id = STOPS
    return model


def number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little")


class Graded(RuleJudge):
    """Scores a text by a function of it; P(a beats b) is the logistic of the difference."""

    def __init__(self, grade: Callable[[str], float]) -> None:
        super().__init__(lambda prompts, completions: [grade(text) for text in completions])

    def prefer(self, prompts: Sequence[Prompt], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        return 1 / (1 + np.exp(self.score(prompts, b) - self.score(prompts, a)))


def fine(text: str) -> float:
    return number(text) / 2**31


def coarse(text: str) -> float:
    return float(number(text) % 2)


def make_trainer(
    output_dir: Path,
    algorithm: str = "online_dpo",
    *,
    trainer_class: type[RoundTrainer] | None = None,
    model: nn.Module | None = None,
    judge: Judge | None = None,
    sampling: Any = TWO,
    prompts: Sequence[Prompt] = PROMPTS[:12],
    rows: Sequence[dict[str, Any]] | None = None,
    engine: Any = None,
    callbacks: Any = (),
    peft_config: Any = None,
    **options: Any,
) -> RoundTrainer:
    """A trainer on 12 prompts in 2 rounds of 6 pairs, which 3 steps pass over twice."""
    config_class, default_class = TRAINERS[algorithm]
    settings = {"rounds": 2, "seed": SEED, **EVERY_RUN, **options}
    return (trainer_class or default_class)(
        model or tiny_policy(),
        config_class(output_dir=str(output_dir), **settings),
        train_dataset=[pair_of(prompt) for prompt in prompts] if rows is None else rows,
        judge=judge or Graded(fine),
        sampling=sampling,
        engine=engine,
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        peft_config=peft_config,
    )


pytestmark = pytest.mark.usefixtures("frozen_heap")


Make = Callable[..., RoundTrainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes trainers, each in a run folder, on the same prompts and weights."""
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(trainer: RoundTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def reports(trainer: RoundTrainer) -> list[dict[str, Any]]:
    return [
        row for path in sorted(trainer.rounds_dir.glob("*/round.json")) for row in read_lines(path)
    ]


def samples(folder: Path, draw: int = 0) -> dict[int, list[Sample]]:
    found: dict[int, list[Sample]] = {}
    for path in sorted((folder / f"draw-{draw}").glob("rollouts-*.parquet")):
        found |= read_rollouts(path)
    return found


def texts(folder: Path, draw: int = 0) -> dict[int, list[str]]:
    return {p: [s.completion.text for s in group] for p, group in samples(folder, draw).items()}


class Steps(TrainerCallback):
    """Notes, at each step, the weights before it, the round, and how often Adam has stepped."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.adam: list[int] = []

    def on_step_begin(self, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        self.before.append(weights(model))

    def on_step_end(self, *_: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        self.after.append(weights(model))
        self.adam.append(int(next(iter(optimizer.state.values()))["step"]))


class Watched(TransformersEngine):
    """Notes the weights of each call and the settings of its prompts."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, TOKENIZER, **kwargs)
        self.calls: list[tuple[dict[str, Tensor], list[SamplingSettings]]] = []

    def generate(
        self, prompts: Any, settings: list[SamplingSettings], **kwargs: Any
    ) -> list[list[Completion]]:
        self.calls.append((weights(self.model), settings))
        return super().generate(prompts, settings, **kwargs)


class Rows(OnlineDPOTrainer):
    """Notes the rows and losses of each step, fillers left out."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.rows: dict[int, list[int]] = {}
        return super().train(*args, **kwargs)

    def tree_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if not inputs["filler"]:
            self.rows.setdefault(self.state.global_step, []).extend(inputs["index"].tolist())
        return super().tree_losses(model, inputs)


# --- which prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompts", "rounds"), [(12, 3), (7, 3), (5, 5), (9, 1)])
def test_one_pass_deals_every_prompt_once(prompts: int, rounds: int) -> None:
    plan = plan_rounds(prompts, rounds=rounds, prompts_per_round=None, seed=SEED)
    assert sorted(chain(*(planned.prompts for planned in plan))) == list(range(prompts))
    sizes = [len(planned.prompts) for planned in plan]
    assert len(sizes) == rounds
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("prompts", "rounds", "each"), [(7, 5, 3), (7, 4, 7), (3, 2, 8), (5, 1, 2)]
)
def test_many_passes_use_all_prompts_equally_often(prompts: int, rounds: int, each: int) -> None:
    plan = plan_rounds(prompts, rounds=rounds, prompts_per_round=each, seed=SEED)
    assert [len(planned.prompts) for planned in plan] == [each] * rounds
    used = Counter(dict.fromkeys(range(prompts), 0))
    used.update(chain(*(planned.prompts for planned in plan)))
    assert max(used.values()) - min(used.values()) <= 1
    for planned in plan:
        keys = list(zip(planned.prompts, planned.passes, strict=True))
        assert len(set(keys)) == each


def test_without_a_number_of_rounds_one_pass_is_filled() -> None:
    plan = plan_rounds(7, rounds=None, prompts_per_round=3, seed=SEED)
    assert [len(planned.prompts) for planned in plan] == [3, 3, 1]
    assert sorted(chain(*(planned.prompts for planned in plan))) == list(range(7))


def test_a_plan_depends_on_its_seed_alone() -> None:
    def plan(seed: int, rounds: int = 2) -> list[list[int]]:
        dealt = plan_rounds(50, rounds=rounds, prompts_per_round=20, seed=seed)
        return [planned.prompts for planned in dealt]

    assert plan(0) == plan(0)
    assert plan(0) != plan(1)
    assert plan(0, rounds=4)[:2] == plan(0)


@pytest.mark.parametrize(
    ("rounds", "each", "message"),
    [
        (None, None, "both null"),
        (0, None, "rounds: found 0"),
        (2, 0, "prompts_per_round: found 0"),
        (6, None, "found 6, but there are 5 prompts"),
    ],
)
def test_plans_that_cannot_be_are_refused(rounds: Any, each: Any, message: str) -> None:
    with pytest.raises(PrefoptError, match=message):
        plan_rounds(5, rounds=rounds, prompts_per_round=each, seed=SEED)


# --- what is sampled -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shard", "batch"), [(1, 64), (5, 3), (64, 1)])
def test_samples_and_pairs_do_not_depend_on_shards_or_batches(
    make: Make, shard: int, batch: int
) -> None:
    one = make("one", rounds=1)
    other = make("other", rounds=1, prompts_per_shard=shard, generation_batch_size=batch)
    for trainer in (one, other):
        trainer.train()
    folders = [trainer.rounds_dir / "0000" for trainer in (one, other)]
    assert samples(folders[0]) == samples(folders[1])
    for name in ("pairs.jsonl", "round.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert len(list((folders[1] / "draw-0").glob("[rj]*-*"))) == 2 * math.ceil(12 / shard)
    assert equal(weights(one.model), weights(other.model))


def test_pairs_are_data_that_dpo_trains_on(make: Make, tmp_path: Path) -> None:
    trainer = make(rounds=1)
    trainer.train()
    rows = read_lines(trainer.rounds_dir / "0000" / "pairs.jsonl")
    assert len(rows) == 12
    for row in rows:
        pair = parse_pair(row, "pairs.jsonl")
        assert fine(row["chosen"]) > fine(row["rejected"])
        assert pair.p_chosen == 1.0
    options = {**EVERY_RUN, "max_steps": 1}
    offline = DPOTrainer(
        tiny_policy(),
        DPOConfig(output_dir=str(tmp_path / "dpo"), **options),
        rows,
        processing_class=TOKENIZER,
    )
    offline.train()
    assert math.isfinite(logged(offline, "loss")[0])


def test_every_part_of_a_mix_samples_at_its_own_temperature(make: Make) -> None:
    policy = tiny_policy()
    engine = Watched(policy)
    parts = [
        SamplingSettings(samples_per_prompt=3, max_new_tokens=6, temperature=1.0),
        SamplingSettings(samples_per_prompt=1, max_new_tokens=6, temperature=0.7),
    ]
    trainer = make(rounds=1, model=policy, engine=engine, sampling=parts)
    trainer.train()
    for group in samples(trainer.rounds_dir / "0000").values():
        assert [sample.temperature for sample in group] == [1.0, 1.0, 1.0, 0.7]
    [(_, settings)] = engine.calls
    assert [own.first_sample for own in settings] == [0, 3] * 12
    assert reports(trainer)[0]["samples"] == 4 * 12


def test_a_mix_of_equal_halves_is_no_mix(make: Make) -> None:
    half = SamplingSettings(samples_per_prompt=2, max_new_tokens=6)
    whole = SamplingSettings(samples_per_prompt=4, max_new_tokens=6)
    trainers = [make("mix", rounds=1, sampling=[half, half]), make("one", rounds=1, sampling=whole)]
    for trainer in trainers:
        trainer.train()
    mixed, one = (texts(trainer.rounds_dir / "0000") for trainer in trainers)
    assert mixed == one
    assert all(group[:2] != group[2:] for group in mixed.values())


def test_rounds_and_passes_have_noise_of_their_own(make: Make) -> None:
    trainer = make(prompts=PROMPTS[:5], prompts_per_round=10, learning_rate=0.0)
    trainer.train()
    drawn: dict[int, list[tuple[str, ...]]] = {}
    for index, planned in enumerate(trainer.plan):
        found = texts(trainer.rounds_dir / f"{index:04d}")
        for position, prompt in enumerate(planned.prompts):
            drawn.setdefault(prompt, []).append(tuple(found[position]))
    assert [len(groups) for groups in drawn.values()] == [4] * 5
    for groups in drawn.values():
        assert len({text for group in groups for text in group}) == 8


def test_a_round_is_sampled_after_the_last_step_of_the_one_before(make: Make) -> None:
    policy = tiny_policy()
    start, engine, steps = weights(policy), Watched(policy), Steps()
    trainer = make(model=policy, engine=engine, callbacks=[steps], prompts_per_shard=4, rounds=3)
    trainer.train()
    assert trainer.state.global_step == 6, "two passes over 4 pairs, 4 a step, in each round"
    expected = [start, steps.after[1], steps.after[3]]
    assert not equal(start, steps.after[1])
    assert not equal(steps.after[1], steps.after[3])
    assert len(engine.calls) == 3
    assert all(equal(found, own) for (found, _), own in zip(engine.calls, expected, strict=True))


# --- what a round begins with --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer_state", "shares", "adam"),
    [
        ("fresh", [3 / 3, 2 / 3, 1 / 3, 3 / 3, 2 / 3, 1 / 3], [1, 2, 3, 1, 2, 3]),
        ("continue", [6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_schedule_and_optimiser_begin_afresh_or_go_on(
    make: Make, optimizer_state: str, shares: list[float], adam: list[int]
) -> None:
    steps = Steps()
    trainer = make(optimizer_state=optimizer_state, lr_scheduler_type="linear", callbacks=[steps])
    trainer.train()
    assert logged(trainer, "learning_rate") == pytest.approx([PEAK * share for share in shares])
    assert logged(trainer, "round") == [0, 0, 0, 1, 1, 1]
    assert steps.adam == adam


@pytest.mark.parametrize("optimizer_state", ["fresh", "continue"])
def test_a_round_of_one_step_trains_in_spite_of_its_warm_up(
    make: Make, optimizer_state: str
) -> None:
    """transformers' warm-up begins at a rate of 0: of such rounds nothing would be left."""
    trainer = make(
        per_device_train_batch_size=16,
        num_train_epochs=1,
        warmup_steps=0.03,
        optimizer_state=optimizer_state,
    )
    trainer.train()
    assert logged(trainer, "learning_rate") == [PEAK, PEAK]


def test_a_limit_on_steps_ends_one_schedule_over_all_rounds_too(make: Make) -> None:
    trainer = make(optimizer_state="continue", lr_scheduler_type="linear", max_steps=4)
    trainer.train()
    shares = [4 / 4, 3 / 4, 2 / 4, 1 / 4]
    assert logged(trainer, "learning_rate") == pytest.approx([PEAK * share for share in shares])


def test_a_limit_on_steps_and_short_rounds_still_end_the_schedule(make: Make) -> None:
    plan = plan_rounds(12, rounds=2, prompts_per_round=None, seed=SEED)
    undecided = [PROMPTS[i] for i in plan[0].prompts[:3]]
    options = {"optimizer_state": "continue", "lr_scheduler_type": "linear", "max_steps": 4}
    trainer = make(judge=TiesOn(undecided), **options)
    trainer.train()
    shares = [4 / 4, 3 / 4, 2 / 4, 1 / 4]
    assert logged(trainer, "learning_rate") == pytest.approx([PEAK * share for share in shares])


def test_a_least_rate_is_an_absolute_one(make: Make) -> None:
    kwargs = {"lr_end": PEAK / 5}
    trainer = make(lr_scheduler_type="polynomial", lr_scheduler_kwargs=kwargs, rounds=1)
    trainer.train()
    rates = logged(trainer, "learning_rate")
    steps = len(rates)
    assert rates[-1] == pytest.approx(PEAK / 5 + (PEAK - PEAK / 5) / steps)


def test_the_callers_arguments_stay_as_they_are(make: Make) -> None:
    config = TRAINERS["online_dpo"][0](output_dir="run", rounds=2, **EVERY_RUN)
    before = config.max_steps
    OnlineDPOTrainer(
        tiny_policy(),
        config,
        [{"prompt": prompt} for prompt in PROMPTS[:12]],
        judge=Graded(fine),
        processing_class=TOKENIZER,
    )
    assert config.max_steps == before


def test_greedy_samples_are_refused(make: Make) -> None:
    with pytest.raises(PrefoptError, match=r"temperature: found 0 \(greedy\) for 2 samples"):
        make(sampling=SamplingSettings(samples_per_prompt=2, temperature=0))


def test_one_schedule_over_all_rounds_gives_a_short_round_its_planned_part(make: Make) -> None:
    plan = plan_rounds(12, rounds=2, prompts_per_round=None, seed=SEED)
    undecided = [PROMPTS[i] for i in plan[0].prompts[:3]]
    trainer = make(optimizer_state="continue", lr_scheduler_type="linear", judge=TiesOn(undecided))
    trainer.train()
    assert [report["pairs"] for report in reports(trainer)] == [3, 6]
    shares = [6 / 6, 4.5 / 6, 3 / 6, 2 / 6, 1 / 6]  # 2 steps in place of the 3 that were planned
    assert logged(trainer, "learning_rate") == pytest.approx([PEAK * share for share in shares])


@pytest.mark.parametrize("initial_policy", ["initial", "previous"])
def test_a_round_trains_on_from_the_weights_it_is_told(make: Make, initial_policy: str) -> None:
    policy, steps = tiny_policy(), Steps()
    engine, start = Watched(policy), weights(policy)
    make(model=policy, engine=engine, initial_policy=initial_policy, callbacks=[steps]).train()
    assert equal(steps.before[3], start if initial_policy == "initial" else steps.after[2])
    assert equal(engine.calls[1][0], steps.after[2]), "sampled from the newest policy either way"


@pytest.mark.parametrize("which", ["initial", "previous"])
def test_margins_are_zero_where_the_policy_is_its_reference(make: Make, which: str) -> None:
    trainer = make(reference=which, beta=1.0)
    trainer.train()
    margins = [abs(margin) for margin in logged(trainer, "rewards/margins")]
    assert margins[0] < 1e-5
    assert margins[2] > 1e-3
    assert margins[3] < 1e-5 if which == "previous" else margins[3] > 1e-3


def test_inpo_is_at_its_starting_loss_when_a_round_begins(make: Make) -> None:
    # h = 0 in the first round: (p - 1/2)^2 / eta^2 + p (1 - p) / eta^2 = 1 / (4 eta^2) = 100
    trainer = make(algorithm="inpo", eta=0.05, tau=0.0)
    trainer.train()
    first = logged(trainer, "round").index(1)
    assert logged(trainer, "loss")[0] == pytest.approx(100, rel=1e-5)
    assert logged(trainer, "loss")[first] == pytest.approx(100, rel=1e-5), (
        "with tau = 0 only pi_t counts"
    )
    assert abs(logged(trainer, "loss")[first + 1] - 100) > 1e-2


class Reference(TrainerCallback):
    """Notes the stamps of the first round's stored log-probs after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stamps: set[tuple[int, int]] = set()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        for path in self.folder.glob("*.safetensors"):
            found = path.stat()
            self.stamps.add((found.st_mtime_ns, found.st_ino))


@pytest.mark.parametrize("window", ["this_round", "all_so_far"])
def test_a_data_window_says_which_pairs_are_trained_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, window: str
) -> None:
    computed: list[int] = []
    fill = reference.fill_shards

    def counted(shards: Any, trees: Any, model: Any, read: Any, **kwargs: Any) -> None:
        if not shards.folder.name.startswith("kl-"):
            computed.append(len(trees))
        fill(shards, trees, model, read, **kwargs)

    monkeypatch.setattr(reference, "fill_shards", counted)
    stamps = Reference(tmp_path / "run" / "rounds" / "0000" / "log_probs" / "initial")
    trainer = make(trainer_class=Rows, data_window=window, num_train_epochs=1, callbacks=[stamps])
    trainer.train()
    pairs = [report["pairs"] for report in reports(trainer)]
    assert pairs == [6, 6]
    size = {"this_round": 6, "all_so_far": 12}[window]
    assert len(trainer.dataset) == size
    last = chain(*(rows for step, rows in trainer.rows.items() if step >= 2))
    assert sorted(last) == list(range(size))
    assert trainer.state.global_step == 2 + math.ceil(size / 4)
    assert computed == [6, 6], "log-probs of old pairs are read again, never computed again"
    assert len(stamps.stamps) == 1


def test_all_pairs_so_far_stand_in_the_order_of_their_rounds(make: Make) -> None:
    trainer = make(data_window="all_so_far", reference="previous")
    trainer.train()
    stored = [
        read_pairs(trainer.rounds_dir / f"{k:04d}", trainer.plan[k], trainer.prompts).trees
        for k in range(2)
    ]
    assert trainer.dataset.trees == [*stored[0], *stored[1]]
    for k in range(2):
        path = trainer.rounds_dir / f"{k:04d}" / "log_probs" / "policy-0001"
        assert len(LogProbShards(path, [2] * 6).load()) == 6


# --- how a round is trained on -------------------------------------------------------------------


def test_every_pair_is_trained_on_once_a_pass(make: Make) -> None:
    trainer = make(trainer_class=Rows, prompts=PROMPTS[:13], rounds=1, num_train_epochs=2)
    trainer.train()
    steps = list(trainer.rows.values())
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 4, 2]
    in_order = list(chain(*steps))
    assert sorted(in_order[:13]) == sorted(in_order[13:]) == list(range(13))
    assert in_order[:13] != in_order[13:]


def test_half_a_pass_takes_half_of_the_pairs(make: Make) -> None:
    trainer = make(trainer_class=Rows, rounds=1, num_train_epochs=1.5)
    trainer.train()
    assert Counter(Counter(chain(*trainer.rows.values())).values()) == {1: 6, 2: 6}


def test_rows_come_in_order_where_that_is_asked_for(make: Make) -> None:
    trainer = make(trainer_class=Rows, rounds=1, train_sampling_strategy="sequential")
    trainer.train()
    assert list(chain(*trainer.rows.values())) == [*range(12), *range(12)]


def test_accumulation_and_fillers_do_not_change_the_steps(make: Make) -> None:
    """13 pairs in steps of 8: one pair at a time, the second step of a pass has three fillers."""
    found = []
    for size in (8, 4, 1):
        trainer = make(
            f"run-{size}",
            prompts=PROMPTS[:13],
            rounds=1,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer.train()
        assert trainer.state.global_step == 2
        found.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), trainer))
    start = tiny_policy().state_dict()
    for losses, norms, trainer in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-5)
        assert norms == pytest.approx(found[0][1], rel=1e-4)
        for name, value in trainer.model.state_dict().items():
            assert torch.allclose(value, found[0][2].model.state_dict()[name], rtol=0, atol=1e-5)
    moved = [(found[0][2].model.state_dict()[name] - start[name]).abs().max() for name in start]
    assert max(moved) > 1e-3


@pytest.mark.parametrize(("options", "steps"), [({}, 6), ({"max_steps": 4}, 4)])
def test_the_epoch_is_the_share_of_the_run(make: Make, options: dict[str, Any], steps: int) -> None:
    trainer = make(**options)
    trainer.train()
    shares = [step / steps for step in range(1, steps + 1)]
    assert logged(trainer, "epoch") == pytest.approx(shares)
    assert trainer.state.epoch == 1.0


def test_what_has_no_value_is_not_averaged(make: Make) -> None:
    trainer = make()
    trainer.add_metrics({"some": torch.tensor([1.0, 3.0]), "none": torch.zeros(0)})
    trainer.add_metrics({"some": torch.zeros(0)})
    trainer.log({"loss": 1.0})
    (line,) = trainer.state.log_history
    assert line["some"] == 2.0
    assert "none" not in line


def test_the_last_step_may_be_asked_for(make: Make) -> None:
    trainer = make(max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(reports(trainer)) == 1, "what is not trained on is not sampled"


# --- ties ----------------------------------------------------------------------------------------


class TiesOn(Graded):
    """Finds all answers to some prompts equal."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        super().__init__(fine)
        self.prompts = prompts

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], **_: Any) -> np.ndarray:
        scores = super().score(prompts, completions)
        return np.where([prompt in self.prompts for prompt in prompts], 0.0, scores)


def tied_positions(found: dict[int, list[str]]) -> list[int]:
    return [p for p, (a, b) in found.items() if coarse(a) == coarse(b)]


def test_ties_are_dropped_or_kept_at_one_half(make: Make) -> None:
    kept = make("keep", rounds=1, prompts=PROMPTS, judge=Graded(coarse), ties="keep")
    dropped = make("drop", rounds=1, prompts=PROMPTS, judge=Graded(coarse), ties="drop")
    for trainer in (kept, dropped):
        trainer.train()
    ties = tied_positions(texts(kept.rounds_dir / "0000"))
    assert 0 < len(ties) < 24
    [report] = reports(kept)
    assert (report["pairs"], report["ties_kept"], report["ties_dropped"]) == (24, len(ties), 0)
    rows = read_lines(kept.rounds_dir / "0000" / "pairs.jsonl")
    assert [row["position"] for row in rows if row["p_chosen"] == 0.5] == sorted(ties)
    assert kept.dataset.columns["p_chosen"].count(0.5) == len(ties)
    [report] = reports(dropped)
    assert (report["pairs"], report["ties_dropped"]) == (24 - len(ties), len(ties))
    assert "p_chosen" not in dropped.dataset.columns
    assert dropped.state.global_step == math.ceil(2 * (24 - len(ties)) / 4)


def test_tied_prompts_are_sampled_again(make: Make) -> None:
    trainer = make(
        rounds=1, prompts=PROMPTS, judge=Graded(coarse), ties="resample", prompts_per_shard=5
    )
    trainer.train()
    folder = trainer.rounds_dir / "0000"
    draws = [texts(folder, draw) for draw in range(3)]
    assert sorted(draws[1]) == sorted(tied_positions(draws[0]))
    assert sorted(draws[2]) == sorted(tied_positions(draws[1]))
    for position, group in draws[1].items():
        assert not set(group) & set(draws[0][position]), "the redraw has noise of its own"
    last = draws[0] | draws[1] | draws[2]
    [report] = reports(trainer)
    assert report["redrawn"] == len(draws[1]) + len(draws[2])
    assert report["pairs"] == 24 - len(tied_positions(last))
    assert report["pairs"] > 24 - len(tied_positions(draws[0]))
    for row in read_lines(folder / "pairs.jsonl"):
        group = last[row["position"]]
        assert row["chosen"] == group[row["chosen_sample"]]
        assert row["rejected"] == group[row["rejected_sample"]]
        assert coarse(row["chosen"]) == 1.0 > coarse(row["rejected"])


@pytest.mark.parametrize("undecided", [[0], [1], [2], [0, 1], [1, 2]])
def test_a_round_of_ties_is_passed_over(make: Make, undecided: list[int]) -> None:
    plan = plan_rounds(12, rounds=3, prompts_per_round=None, seed=SEED)
    prompts = [PROMPTS[i] for k in undecided for i in plan[k].prompts]
    trainer = make(rounds=3, judge=TiesOn(prompts))
    trainer.train()
    decided = [k for k in range(3) if k not in undecided]
    assert [report["pairs"] for report in reports(trainer)] == [
        4 * (k in decided) for k in range(3)
    ]
    assert logged(trainer, "round") == [k for k in decided for _ in range(2)]


@pytest.mark.parametrize("algorithm", ["online_dpo", "inpo"])
def test_nothing_but_ties_trains_nothing(make: Make, algorithm: str) -> None:
    trainer = make(algorithm=algorithm, judge=Graded(lambda text: 0.0), ties="drop")
    start = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 0
    assert [report["ties_dropped"] for report in reports(trainer)] == [6, 6]
    assert equal(weights(trainer.model), start)


# --- frozen log-probs ----------------------------------------------------------------------------


def direct(model: nn.Module, trees: Sequence[PromptTree]) -> Tensor:
    enable_trees(model)
    with torch.no_grad():
        return sequence_log_probs(model.eval(), collate_trees(trees))


def stored(trainer: RoundTrainer, index: int, name: str) -> tuple[list[PromptTree], Tensor]:
    folder = trainer.rounds_dir / f"{index:04d}"
    trees = read_pairs(folder, trainer.plan[index], trainer.prompts).trees
    return trees, torch.cat(LogProbShards(folder / "log_probs" / name, [2] * len(trees)).load())


def test_stored_log_probs_are_those_of_the_frozen_policies(make: Make) -> None:
    steps = Steps()
    trainer = make(algorithm="inpo", callbacks=[steps])
    trainer.train()
    for index in range(2):
        trees, found = stored(trainer, index, "initial")
        assert torch.allclose(found, direct(tiny_policy(), trees), atol=1e-4)
    trees, found = stored(trainer, 1, "policy-0001")
    previous = tiny_policy()
    previous.load_state_dict(steps.after[2])
    expected = direct(previous, trees)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(direct(tiny_policy(), trees), expected, atol=1e-2)
    assert torch.equal(torch.cat(list(trainer.dataset.columns["previous"])), found)


def test_the_kl_that_is_logged_is_that_of_the_first_samples(make: Make) -> None:
    steps = Steps()
    trainer = make(callbacks=[steps])
    trainer.train()
    ids, planned = trainer.prompts.prompt_ids, trainer.plan[1].prompts
    trees = [
        PromptTree(ids[planned[position]], [group[0].completion.token_ids])
        for position, group in samples(trainer.rounds_dir / "0001").items()
    ]
    sampled_from = tiny_policy()
    sampled_from.load_state_dict(steps.after[2])
    expected = (direct(sampled_from, trees) - direct(tiny_policy(), trees)).mean().item()
    assert expected > 1e-2
    found = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert found == [pytest.approx(expected, abs=1e-4)]


def test_under_an_adapter_the_reference_stays_the_base_model(make: Make) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make(peft_config=adapter, learning_rate=0.05, beta=1.0)
    trainer.train()
    for index in range(2):
        trees, found = stored(trainer, index, "initial")
        assert torch.allclose(found, direct(tiny_policy(), trees), atol=1e-4)
    margins = logged(trainer, "rewards/margins")
    assert abs(margins[0]) < 1e-5
    assert abs(margins[3]) > 1e-3
    trainable = (trainer.rounds_dir / "initial" / "trainable.safetensors").stat().st_size
    assert trainable < sum(p.numel() * 4 for p in tiny_policy().parameters()) / 2


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("online_dpo", {"sampling": SamplingSettings()}, "expected at least 2"),
        (
            "inpo",
            {"sampling": SamplingSettings(samples_per_prompt=3), "pairing": "independent"},
            "expected an even number",
        ),
        ("online_dpo", {"loss_type": "aot", "ties": "keep"}, "knows no soft labels"),
        ("online_dpo", {"loss_type": "aot", "soft_labels": True}, "knows no soft labels"),
        ("online_dpo", {"reference": "newest"}, "expected initial or previous"),
        ("online_dpo", {"prompts_per_shard": 0}, "prompts_per_shard: found 0"),
        ("online_dpo", {"loss_type": "sppo_soft"}, "needs soft_labels: true"),
        ("online_dpo", {"save_strategy": "best"}, "save_strategy: found best"),
        ("inpo", {"tau": 0.5}, "from 0 to eta"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    make: Make, algorithm: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        make(algorithm=algorithm, **options)


class Preferring:
    """Compares and has no scores."""

    def prefer(self, prompts: Any, a: Any, b: Any) -> np.ndarray:
        return np.ones(len(prompts))


@pytest.mark.parametrize("algorithm", ["online_dpo", "inpo", "nash_mp", "ppo", "drpo"])
@pytest.mark.parametrize(
    ("judge", "found"),
    [
        (None, "NoneType"),
        (fine, "function"),
        (tiny_policy(), "LlamaForCausalLM"),
        (Preferring(), "Preferring"),
        (Graded, "_ProtocolMeta|type|ABCMeta"),
    ],
    ids=["none", "function", "model", "no-scores", "class"],
)
def test_what_is_no_judge_is_refused(
    tmp_path: Path, algorithm: str, judge: Any, found: str
) -> None:
    config_class, trainer_class = TRAINERS[algorithm]
    args = config_class(output_dir=str(tmp_path), rounds=2, **EVERY_RUN)
    rows = [pair_of(prompt) for prompt in PROMPTS]
    asked = "score" if algorithm in ("ppo", "drpo") else "score and prefer"
    message = f"judge: found {found}, but {trainer_class.__name__} needs one with {asked};"
    with pytest.raises(PrefoptError, match=message):
        trainer_class(tiny_policy(), args, rows, judge=judge, processing_class=TOKENIZER)


class Forgetful(Graded):
    """Leaves out the last answer."""

    def score(self, prompts: Any, completions: Any, **columns: Any) -> np.ndarray:
        return super().score(prompts, completions)[:-1]


class Chatty(Graded):
    """Gives one preference too many."""

    def prefer(self, prompts: Any, a: Any, b: Any) -> np.ndarray:
        return np.append(super().prefer(prompts, a, b), 0.5)


@pytest.mark.parametrize(
    ("algorithm", "judge", "message"),
    [
        ("online_dpo", Forgetful(fine), r"the shape \[11\], expected \[12\]"),
        ("ppo", Forgetful(fine), r"the shape \[7\], expected \[8\]"),
        ("inpo", Chatty(fine), r"the shape \[7\], expected \[6\]"),
        ("nash_mp", Chatty(fine), r"the shape \[5\], expected \[4\]"),
    ],
)
def test_a_judge_answers_what_it_is_asked(
    make: Make, algorithm: str, judge: Judge, message: str
) -> None:
    """Two rounds of 6 prompts x 2 samples, or of one batch of 4."""
    with pytest.raises(PrefoptError, match=message):
        make(algorithm=algorithm, judge=judge).train()


ROUNDS = ["online_dpo", "inpo", "hypo", "nash_mp", "ppo", "drpo"]


@pytest.mark.parametrize(
    ("algorithm", "other"),
    [
        (algorithm, other)
        for algorithm in ROUNDS
        for other in ("dpo", *ROUNDS)
        if not issubclass(TRAINERS[other][0], TRAINERS[algorithm][0])
    ],
)
def test_arguments_of_another_class_are_refused(tmp_path: Path, algorithm: str, other: str) -> None:
    (expected, trainer_class), (config_class, _) = TRAINERS[algorithm], TRAINERS[other]
    args = config_class(output_dir=str(tmp_path), **EVERY_RUN)
    message = (
        f"args: found {config_class.__name__}, but {trainer_class.__name__} needs "
        f"{expected.__name__}$"
    )
    rows = [pair_of(prompt) for prompt in PROMPTS]
    with pytest.raises(PrefoptError, match=message):
        trainer_class(tiny_policy(), args, rows, judge=Graded(fine), processing_class=TOKENIZER)


class Scoring:
    """Has scores and compares nothing."""

    def score(self, prompts: Any, completions: Any, **_: Any) -> np.ndarray:
        return np.array([fine(text) for text in completions])


def test_a_judge_need_not_answer_what_nobody_asks(make: Make) -> None:
    trainer = make("run", "ppo", judge=Scoring(), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_held_out_rows_are_refused(make: Make, tmp_path: Path) -> None:
    message = "OnlineDPOTrainer: found eval_strategy or eval_dataset"
    with pytest.raises(PrefoptError, match=message):
        make(eval_strategy="steps", eval_steps=1)
    config_class, trainer_class = TRAINERS["online_dpo"]
    for held_out in ([], [pair_of(PROMPTS[0])]):
        with pytest.raises(PrefoptError, match=message):
            trainer_class(
                tiny_policy(),
                config_class(output_dir=str(tmp_path), rounds=2, **EVERY_RUN),
                [pair_of(prompt) for prompt in PROMPTS],
                judge=Graded(fine),
                eval_dataset=held_out,
                processing_class=TOKENIZER,
            )


@pytest.mark.parametrize(
    ("algorithm", "options", "rows", "message"),
    [
        ("hypo", {}, "prompts", "found TokenizedPrompts, expected PromptedPairs"),
        ("drpo", {}, "prompts", "found TokenizedPrompts, expected PromptedAnswers"),
        ("drpo", {}, "pairs", "found PromptedPairs, expected PromptedAnswers"),
        ("hypo", {}, "answers", "found PromptedAnswers, expected PromptedPairs"),
        (
            "ppo",
            {"offline_value_weight": 0.5},
            "prompts",
            "found TokenizedPrompts, expected PromptedPairs",
        ),
    ],
)
def test_tokenised_rows_of_the_wrong_kind_are_refused(
    make: Make, tmp_path: Path, algorithm: str, options: dict[str, Any], rows: str, message: str
) -> None:
    source = {"prompts": "ppo", "pairs": "hypo", "answers": "drpo"}[rows]
    tokenised = make("source", source).prompts
    with pytest.raises(PrefoptError, match=f"train_dataset: {message}"):
        make("run", algorithm, rows=tokenised, **options)


@pytest.mark.parametrize("algorithm", ["hypo", "drpo", "ppo", "online_dpo"])
def test_tokenised_rows_of_the_right_kind_train_like_the_rows(make: Make, algorithm: str) -> None:
    rows = make("rows", algorithm, max_steps=1)
    tokenised = make("tokenised", algorithm, max_steps=1, rows=rows.prompts)
    for trainer in (rows, tokenised):
        trainer.train()
    assert equal(weights(rows.model), weights(tokenised.model))


def test_a_schedule_that_waits_for_losses_is_refused(tmp_path: Path) -> None:
    config_class, _ = TRAINERS["online_dpo"]
    options = {**EVERY_RUN, "lr_scheduler_type": "greedy", "eval_strategy": "steps"}
    with pytest.raises(PrefoptError, match="depends on more than the step"):
        schedule(config_class(output_dir=str(tmp_path), **options), 10)


class Stopped(Exception):  # noqa: N818 - no error
    pass


# --- recipes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> WorldPaths:
    folder = tmp_path_factory.mktemp("world") / "world"
    return build_world(folder, sft_rows=1, preference_rows=16, prompt_rows=1)


@pytest.fixture(scope="module")
def judges(world: WorldPaths, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untrained judge of each kind; a preference model is a plain causal LM."""
    folder = tmp_path_factory.mktemp("judges") / "reward_model"
    load_reward_model(str(world.base), TOKENIZER, new_head=True).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return {"reward_model": folder, "preference_model": world.base}


@pytest.fixture
def recipe(world: WorldPaths, judges: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "shared.yaml"
    path.write_text(
        f"""
        model: {{path: {world.base}}}
        data: {{path: {world.preferences}}}
        judge: {{kind: reward_model, path: {judges["reward_model"]}}}
        rollout: {{samples_per_prompt: 2, max_new_tokens: 5, batch_size: 32}}
        run_dir: {tmp_path}/run
        trainer:
          algorithm: dpo
          rounds: 2
          num_train_epochs: 1
          per_device_train_batch_size: 4
          learning_rate: 1.0e-3
          beta: 0.1
          eta: 0.1
          tau: 0.03
          logging_steps: 1
          save_strategy: steps
          save_steps: 2
        """
    )
    return path


@pytest.mark.parametrize("kind", ["reward_model", "preference_model"])
@pytest.mark.parametrize("algorithm", ["dpo", "online_dpo", "inpo"])
def test_the_algorithm_alone_is_switched(
    recipe: Path, judges: dict[str, Path], tmp_path: Path, algorithm: str, kind: str
) -> None:
    options = [f"judge.kind={kind}", f"judge.path={judges[kind]}"]
    summary = train(read_recipe(recipe, [*options, f"trainer.algorithm={algorithm}"]))
    assert summary["steps"] == 4
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    if algorithm == "dpo":
        assert "rounds" not in summary
    else:
        assert [report["pairs"] for report in summary["rounds"]] == [8, 8]
        assert sum(report["prompts"] for report in summary["rounds"]) == 16


def test_a_recipe_mixes_temperatures(recipe: Path, tmp_path: Path) -> None:
    mix = "rollout.mix=[{temperature: 1.0}, {temperature: 0.7}]"
    options = ["trainer.algorithm=online_dpo", "rollout.samples_per_prompt=4", mix]
    train(read_recipe(recipe, options))
    for group in samples(tmp_path / "run" / "rounds" / "0001").values():
        assert [sample.temperature for sample in group] == [1.0, 1.0, 0.7, 0.7]


def test_a_recipe_in_rounds_needs_a_judge(recipe: Path) -> None:
    with pytest.raises(PrefoptError, match="needs a section judge"):
        train(read_recipe(recipe, ["trainer.algorithm=online_dpo", "judge=null"]))


def test_check_tells_of_rounds_and_of_a_judge_that_is_not_there_yet(recipe: Path) -> None:
    options = ["trainer.algorithm=online_dpo"]
    found = check(recipe, options)
    assert (sum(found["rounds"]), len(found["rounds"]), found["errors"]) == (16, 2, 0)
    assert found["samples"] == 2
    assert "samples" not in check(recipe), "of an algorithm that draws none"
    assert found["train"]["example"]["where"].endswith(".jsonl:1"), "the place of the row"
    missing = check(recipe, [*options, "judge.path=nowhere"])
    assert [f["found"].split()[0] for f in missing["findings"] if f["kind"] == "judge"] == [
        "judge.path:"
    ]
    with pytest.raises(PrefoptError, match=r"judge.path: .*nowhere"):
        train(read_recipe(recipe, [*options, "judge.path=nowhere"]))
    [found] = check(recipe, [*options, "trainer.rounds=1000"])["findings"]
    assert (found["severity"], found["kind"]) == ("error", "rounds")
    assert "rounds: found 1000, but there are 16 prompts" in found["found"]


def test_a_recipe_asks_for_enough_samples(recipe: Path) -> None:
    options = ["trainer.algorithm=inpo", "rollout.samples_per_prompt=1"]
    with pytest.raises(PrefoptError, match="expected at least 2"):
        train(read_recipe(recipe, options))


@pytest.mark.parametrize("kind", ["sometimes", "reduce_lr_on_plateau"])
def test_a_schedule_nobody_knows_is_refused_before_sampling(
    recipe: Path, tmp_path: Path, kind: str
) -> None:
    options = ["trainer.algorithm=online_dpo", f"trainer.lr_scheduler_type={kind}"]
    with pytest.raises(PrefoptError, match=kind):
        train(read_recipe(recipe, options))
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_its_summary_says_the_same(recipe: Path, tmp_path: Path) -> None:
    options = ["trainer.algorithm=online_dpo"]
    first = train(read_recipe(recipe, options))
    (tmp_path / "run" / "summary.json").unlink()
    again = train(read_recipe(recipe, options))
    del first["seconds"], again["seconds"]
    assert again == first


def test_metrics_of_an_interrupted_run_have_no_line_twice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["trainer.algorithm=online_dpo", "trainer.save_strategy=epoch"]
    losses = OnlineDPOTrainer.tree_losses

    def failing(self: OnlineDPOTrainer, model: Any, inputs: Any) -> Any:
        if self.state.global_step == 2:  # the second round has just begun
            raise Stopped
        return losses(self, model, inputs)

    monkeypatch.setattr(OnlineDPOTrainer, "tree_losses", failing)
    with pytest.raises(Stopped):
        train(read_recipe(recipe, options))
    monkeypatch.undo()
    train(read_recipe(recipe, options))
    train(read_recipe(recipe, [*options, f"run_dir={tmp_path}/whole"]))
    lines = [
        [(row["step"], "loss" in row) for row in read_lines(tmp_path / run / "metrics.jsonl")]
        for run in ("run", "whole")
    ]
    assert lines[0] == lines[1]
