"""Runs in rounds that are interrupted, killed or spread over two processes end as if they were not.

Kills are real ones of ``python -m prefopt train``; interruptions within this process say what each
kind of round owes to that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from run_folders import beside_the_policy, complete, contents, modified, phase, stamps
from safetensors.torch import load_file
from test_rounds import (
    PROMPTS,
    SEED,
    TOKENIZER,
    Graded,
    Make,
    Stopped,
    brief_policy,
    coarse,
    equal,
    fine,
    logged,
    make_trainer,
    tiny_policy,
    weights,
)
from transformers import TrainerCallback

from prefopt.errors import PrefoptError
from prefopt.models.load import load_reward_model
from prefopt.rollout.engine import SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.store import read_lines, read_rollouts
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.rounds import RoundTrainer
from prefopt.world import build_world

TESTS = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
}


pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes trainers, each in a run folder, on the same prompts and weights."""
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


# --- interrupted runs ----------------------------------------------------------------------------


class StopBefore(TrainerCallback):
    """Ends a run as a step begins: its round is on disk, the step is not taken."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Stopped


def interrupted(make: Make, run: str, step: int, **options: Any) -> str | None:
    trainer = make(run, callbacks=[StopBefore(step)], **options)
    with pytest.raises(Stopped):
        trainer.train()
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    return None if checkpoint is None else str(checkpoint)


EVERY_TWO_STEPS = {"save_strategy": "steps", "save_steps": 2}
EVERY_ROUND = {"save_strategy": "epoch"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RoundTrainer]:
    """Uninterrupted runs, by algorithm."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for algorithm in ("online_dpo", "inpo"):
        runs[algorithm] = make_trainer(folder / algorithm, algorithm)
        runs[algorithm].train()
    return runs


@pytest.mark.parametrize("algorithm", ["online_dpo", "inpo"])
@pytest.mark.parametrize(
    ("saved", "step", "last"),  # a round has three steps
    [
        (EVERY_TWO_STEPS, 1, None),
        (EVERY_TWO_STEPS, 3, 2),
        (EVERY_TWO_STEPS, 5, 4),
        (EVERY_ROUND, 3, 3),
    ],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    make: Make,
    whole: dict[str, RoundTrainer],
    algorithm: str,
    saved: dict[str, Any],
    step: int,
    last: int | None,
) -> None:
    checkpoint = interrupted(make, "stopped", step, algorithm=algorithm, **saved)
    assert (checkpoint and int(checkpoint.rsplit("-", 1)[1])) == last
    resumed = make("stopped", algorithm, **saved)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert equal(weights(whole[algorithm].model), weights(resumed.model))
    assert contents(whole[algorithm].rounds_dir) == contents(resumed.rounds_dir)
    for name in ("loss", "learning_rate", "round", "epoch"):
        assert logged(whole[algorithm], name) == logged(resumed, name)


@pytest.mark.parametrize(
    "options",
    [
        {"reference": "previous"},
        {"data_window": "all_so_far"},
        {"initial_policy": "initial"},
        {"optimizer_state": "continue", "lr_scheduler_type": "cosine"},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_round_can_be_interrupted(make: Make, options: dict[str, Any]) -> None:
    options = options | EVERY_TWO_STEPS
    whole = make("whole", **options)
    whole.train()
    checkpoint = interrupted(make, "stopped", 5, **options)
    resumed = make("stopped", **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert equal(weights(whole.model), weights(resumed.model))


# rounds of two steps and two passes: four steps on eight prompts
SAMPLE_ROUNDS: dict[str, dict[str, Any]] = {
    "hypo": {"algorithm": "hypo", "kl_weight": 0.1},
    "ema": {"algorithm": "nash_mp"},
    "mirror_prox": {"algorithm": "nash_mp", "mode": "mirror_prox", "phase_rounds": 2},
    "drpo": {"algorithm": "drpo", "reset_probability": 0.5},
    "ppo": {"algorithm": "ppo", "offline_value_weight": 0.5, "critic_warmup_rounds": 1},
}
FOUR_STEPS = {"steps_per_round": 2, "rounds": 4, "lr_scheduler_type": "linear"}


def all_weights(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Of everything that a run trains or keeps."""
    critic = getattr(trainer, "critic", None)
    more = {} if critic is None else {"critic": weights(critic)}
    return {"policy": weights(trainer.model), **trainer.kept, **more}


def lines_of_log(trainer: RoundTrainer) -> list[dict[str, Any]]:
    """The log without what tells the time."""
    timed = ("time/", "tokens_per_second")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in trainer.state.log_history
        if "loss" in line
    ]


@pytest.fixture
def make_brief(make: Make) -> Make:
    """Makes trainers of policies whose answers differ in length."""
    return lambda run, **options: make(run, model=brief_policy(), **options)


@pytest.fixture(scope="module")
def whole_on_samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RoundTrainer]:
    """Uninterrupted runs, by kind."""
    folder, runs = tmp_path_factory.mktemp("whole"), {}
    for kind, options in SAMPLE_ROUNDS.items():
        runs[kind] = make_trainer(folder / kind, model=brief_policy(), **FOUR_STEPS, **options)
        runs[kind].train()
    return runs


@pytest.mark.parametrize("kind", SAMPLE_ROUNDS)
@pytest.mark.parametrize(
    ("saved", "step", "last"),  # phases of mirror prox are eight steps
    [
        (3, 1, None),  # from the beginning, with a round on disk
        (3, 5, 3),  # from inside a round that has ended by then
        (3, 7, 6),  # from inside a round
        (3, 8, 6),  # a phase has just begun
        (4, 8, 8),  # between two phases
        (5, 14, 10),  # in the second phase
    ],
)
def test_an_interrupted_run_on_samples_ends_like_an_uninterrupted_one(
    make_brief: Make,
    whole_on_samples: dict[str, RoundTrainer],
    kind: str,
    saved: int,
    step: int,
    last: int | None,
) -> None:
    options = {**FOUR_STEPS, **SAMPLE_ROUNDS[kind], "save_strategy": "steps", "save_steps": saved}
    checkpoint = interrupted(make_brief, "stopped", step, **options)
    assert (checkpoint and int(checkpoint.rsplit("-", 1)[1])) == last
    resumed, whole = make_brief("stopped", **options), whole_on_samples[kind]
    resumed.train(resume_from_checkpoint=checkpoint)
    assert whole.state.global_step == resumed.state.global_step == 16
    expected, found = all_weights(whole), all_weights(resumed)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not equal(expected[name], found[name])] == []
    assert contents(whole.rounds_dir) == contents(resumed.rounds_dir)
    assert lines_of_log(whole) == lines_of_log(resumed)


@pytest.mark.parametrize("kind", SAMPLE_ROUNDS)
def test_an_interrupted_adapter_ends_like_an_uninterrupted_one(make_brief: Make, kind: str) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    saved = {"save_strategy": "steps", "save_steps": 3}
    options = {**FOUR_STEPS, **SAMPLE_ROUNDS[kind], **saved, "peft_config": adapter}
    whole = make_brief("whole", **options)
    whole.train()
    checkpoint = interrupted(make_brief, "stopped", 10, **options)
    assert checkpoint is not None
    assert checkpoint.endswith("-9")
    resumed = make_brief("stopped", **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    expected, found = all_weights(whole), all_weights(resumed)
    assert [name for name in expected if not equal(expected[name], found[name])] == []


@pytest.mark.parametrize(
    ("kind", "gone", "message"),
    [
        ("mirror_prox", "kept/half", "weights this run goes on with are gone"),
        ("ema", "kept/target", "weights this run goes on with are gone"),
        ("drpo", "critic", "weights this run goes on with are gone"),
        ("ppo", "../rounds/0001/log_probs/critic", "its weights have moved"),
        ("drpo", "../rounds/0001/log_probs/policy", "its weights have moved"),
        ("ema", "../rounds/0001/log_probs/target", "its weights have moved"),
        ("hypo", "../rounds/0001/draw-0", "cannot be read"),
        ("hypo", "../rounds/0001", "this round is gone but its training has begun"),
        ("ppo", "../rounds/initial", "weights this run began with are gone"),
    ],
)
def test_what_a_run_on_samples_goes_on_with_is_missed(
    make_brief: Make, kind: str, gone: str, message: str
) -> None:
    options = {**FOUR_STEPS, **SAMPLE_ROUNDS[kind], **EVERY_TWO_STEPS}
    checkpoint = interrupted(make_brief, "run", 7, **options)
    assert checkpoint is not None
    shutil.rmtree(Path(checkpoint) / gone)
    with pytest.raises(PrefoptError, match=message):
        make_brief("run", **options).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("fails", ["judge", "engine"])
def test_what_is_on_disk_is_not_asked_for_again(make: Make, fails: str) -> None:
    """The third of four shards of the second round fails at first."""
    asked: list[str] = []

    class Counted(Graded):
        def score(self, prompts: Any, completions: Any, **columns: Any) -> np.ndarray:
            asked.append("judge")
            if fails == "judge" and asked.count("judge") == 7 and "failed" not in asked:
                asked.append("failed")
                raise Stopped
            return super().score(prompts, completions)

    class Failing(TransformersEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            asked.append("engine")
            if fails == "engine" and asked.count("engine") == 7 and "failed" not in asked:
                asked.append("failed")
                raise Stopped
            return super().generate(*args, **kwargs)

    def attempt(run: str) -> RoundTrainer:
        policy = tiny_policy()
        return make(
            run,
            model=policy,
            engine=Failing(policy, TOKENIZER),
            judge=Counted(fine),
            prompts=PROMPTS[:8],
            prompts_per_shard=1,
            save_strategy="epoch",
        )

    first = attempt("run")
    with pytest.raises(Stopped):
        first.train()
    checkpoint = last_complete_checkpoint(Path(first.args.output_dir))
    assert checkpoint is not None
    attempt("run").train(resume_from_checkpoint=str(checkpoint))
    assert Counter(asked) == {"judge": 8, "engine": 8, "failed": 1} | {fails: 9}
    whole = attempt("whole")
    whole.train()
    assert contents(first.rounds_dir) == contents(whole.rounds_dir)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("0000", "0000: this round is gone but its training has begun"),
        ("0001", "0001: this round is gone but its training has begun"),
        ("initial", "weights this run began with are gone"),
        ("", "weights this run began with are gone"),
    ],
)
def test_rounds_that_are_gone_are_missed(make: Make, gone: str, message: str) -> None:
    checkpoint = interrupted(make, "run", 5, **EVERY_TWO_STEPS)
    trainer = make("run", **EVERY_TWO_STEPS)
    path = trainer.rounds_dir / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(PrefoptError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_log_probs_of_a_policy_that_is_past_are_missed(make: Make) -> None:
    checkpoint = interrupted(make, "run", 5, algorithm="inpo", **EVERY_TWO_STEPS)
    trainer = make("run", "inpo", **EVERY_TWO_STEPS)
    for path in (trainer.rounds_dir / "0001" / "log_probs" / "policy-0001").iterdir():
        path.unlink()
    with pytest.raises(PrefoptError, match="its weights have moved"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_log_probs_of_the_initial_policy_are_made_again(
    make: Make, whole: dict[str, RoundTrainer]
) -> None:
    checkpoint = interrupted(make, "run", 5, **EVERY_TWO_STEPS)
    trainer = make("run", **EVERY_TWO_STEPS)
    for path in trainer.rounds_dir.glob("*/log_probs/initial/*"):
        path.unlink()
    trainer.train(resume_from_checkpoint=checkpoint)
    assert equal(weights(whole["online_dpo"].model), weights(trainer.model))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": SEED + 1}, "seed"),
        ({"sampling": SamplingSettings(samples_per_prompt=2, max_new_tokens=5)}, "sampling"),
        ({"prompts": PROMPTS[1:13]}, "prompts"),
        ({"ties": "keep"}, "ties"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"gradient_accumulation_steps": 4}, "global_batch"),
        ({"prompts_per_shard": 3}, "prompts_per_shard"),
        ({"rounds": 3}, "plan"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rounds_of_other_settings_are_refused(
    make: Make, other: dict[str, Any], named: str
) -> None:
    make(max_steps=1).train()
    with pytest.raises(PrefoptError, match=f"begun with other .*{named}"):
        make(**other).train()


def test_rounds_of_another_model_are_refused(make: Make) -> None:
    make(max_steps=1).train()
    with pytest.raises(PrefoptError, match="begun with other weights"):
        make(model=tiny_policy(seed=1)).train()


# --- killed runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds of 50 prompts, with judges of both kinds beside the recipe."""
    folder = tmp_path_factory.mktemp("killed")
    world = build_world(folder / "world", sft_rows=1, preference_rows=150, prompt_rows=1)
    judge = load_reward_model(str(world.base), TOKENIZER, new_head=True)
    judge.save_pretrained(folder / "reward_model")
    TOKENIZER.save_pretrained(folder / "reward_model")
    path = folder / "recipe.yaml"
    path.write_text(
        f"""
        model: {{path: {world.base}}}
        data: {{path: {world.preferences}}}
        judge: {{kind: reward_model, path: {folder}/reward_model}}
        rollout: {{samples_per_prompt: 4, max_new_tokens: 16, batch_size: 16}}
        trainer:
          algorithm: online_dpo
          rounds: 3
          num_train_epochs: 2
          per_device_train_batch_size: 4
          prompts_per_shard: 2
          learning_rate: 1.0e-3
          logging_steps: 1
          save_strategy: steps
          save_steps: 3
        """
    )
    return path


def start(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Starts a run and waits until it has read its recipe and its data."""
    facts = run / "environment.json"  # written at every start, before the model is loaded
    before = facts.stat().st_mtime_ns if facts.exists() else 0
    command = [sys.executable, "-m", "prefopt", "train", str(recipe), f"run_dir={run}", *overrides]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not facts.exists() or facts.stat().st_mtime_ns == before:
        assert process.poll() is None, f"{run}: the run did not begin"
        time.sleep(0.005)
    return process


def finish(recipe: Path, run: Path, *overrides: str) -> None:
    assert start(recipe, run, *overrides).wait() == 0
    assert (run / "summary.json").exists()


def progress(run: Path, began: int = 0) -> int:
    """Files of the rounds and lines of the log so far: a clock that no busy machine slows down.

    What an earlier process logged does not count until its lines have been gone through.
    """
    metrics = run / "metrics.jsonl"
    counts = metrics.exists() and modified(metrics) > began
    return len(stamps(run)) + (metrics.read_text().count("\n") if counts else 0)


# of algorithms whose rounds are a step by default
ROUNDS_OF_20 = {"prompts_per_round": 20, "num_train_epochs": 2}


# over 20 s: every process imports torch and transformers, and is killed at a random moment
@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "judge", "saved", "kills", "keys"),
    [
        ("online_dpo", "reward_model", "steps", 10, {}),
        ("inpo", "preference_model", "epoch", 4, {}),
        ("hypo", None, "steps", 4, ROUNDS_OF_20 | {"kl_weight": 0.1}),
        ("nash_mp", "preference_model", "steps", 4, ROUNDS_OF_20),
        (
            "nash_mp",
            "reward_model",
            "steps",
            4,
            ROUNDS_OF_20 | {"rounds": 4, "mode": "mirror_prox", "phase_rounds": 1},
        ),
        ("drpo", "reward_model", "steps", 4, ROUNDS_OF_20 | {"reset_probability": 0.7}),
    ],
    ids=["online_dpo", "inpo", "hypo", "nash_mp", "mirror_prox", "drpo"],
)
def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(
    recipe: Path,
    tmp_path: Path,
    algorithm: str,
    judge: str | None,
    saved: str,
    kills: int,
    keys: dict[str, Any],
) -> None:
    path = recipe.parent / ("reward_model" if judge == "reward_model" else "world/base")
    overrides = [
        f"trainer.algorithm={algorithm}",
        f"trainer.save_strategy={saved}",
        f"judge={{kind: {judge}, path: {path}}}" if judge else "judge=null",
        *(f"trainer.{key}={value}" for key, value in keys.items()),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(recipe, whole, *overrides)
    chance = Random(SEED)
    moments = sorted(chance.sample(range(95 * progress(whole) // 100), kills))
    phases: list[str] = []
    known: dict[str, tuple[int, int]] = {}
    for moment in moments:
        process, began = start(recipe, killed, *overrides), time.time_ns()
        while process.poll() is None and progress(killed, began) < moment:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.05))
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        phases.append(phase(killed, began, whole))
        kept = stamps(killed)
        assert {name: kept.get(name) for name in known} == known, "nothing is made twice"
        known = kept
    finish(recipe, killed, *overrides)
    print(f"{algorithm} {keys}: killed while {', '.join(phases)}")
    kept = stamps(killed)
    assert {name: kept.get(name) for name in known} == known, "nothing is made twice"
    assert len({*phases} - {"loading"}) >= (3 if kills == 10 else 2), phases
    assert complete(killed / "rounds") == complete(whole / "rounds")
    a, b = (load_file(run / "final" / "model.safetensors") for run in (whole, killed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert beside_the_policy(killed) == beside_the_policy(whole)
    losses = [
        [(row["step"], row["loss"]) for row in read_lines(run / "metrics.jsonl") if "loss" in row]
        for run in (whole, killed)
    ]
    assert losses[0] == losses[1]
    ends = [json.loads((run / "summary.json").read_text()) for run in (whole, killed)]
    assert ends[0] | {"seconds": 0} == ends[1] | {"seconds": 0}


# --- two processes -------------------------------------------------------------------------------

# steps of eight rows; all but one have nine in a round, so that one process has none of the last
# step's
TOGETHER: dict[str, dict[str, Any]] = {
    "online_dpo": {
        "judge": Graded(coarse),
        "prompts": PROMPTS[:22],
        "ties": "resample",
        "gradient_accumulation_steps": 2,
    },
    "inpo": {"judge": Graded(fine), "prompts": PROMPTS[:18], "eta": 0.1, "tau": 0.03},
    "hypo": {"prompts": PROMPTS[:18], "prompts_per_round": 9, "kl_weight": 0.1},
    "nash_mp": {"prompts": PROMPTS[:18], "prompts_per_round": 9, "kappa": 0.5},
    "ppo": {"prompts": PROMPTS[:18], "prompts_per_round": 9, "offline_value_weight": 0.5},
}
COMMON: dict[str, Any] = {
    "prompts_per_shard": 2,
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
}
WORKER = """
import faulthandler, json, os, sys
from pathlib import Path

import torch.distributed as dist
from test_rounds import logged
from test_rounds_killed import train_together

faulthandler.dump_traceback_later(100, exit=True)  # one that waits in vain says where
trainers = train_together(Path(sys.argv[1]), processes=2)
if dist.get_rank() == 0:
    found = {name: logged(trainer, "loss") for name, trainer in trainers.items()}
    (Path(sys.argv[1]) / "losses.json").write_text(json.dumps(found))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort while the interpreter shuts down
"""


def train_together(folder: Path, processes: int) -> dict[str, RoundTrainer]:
    """Trains every algorithm at a global batch of eight."""
    trainers = {}
    for algorithm, options in TOGETHER.items():
        micro = 8 // processes // options.get("gradient_accumulation_steps", 1)
        settings = {**COMMON, **options, "per_device_train_batch_size": micro}
        if processes > 1:
            settings["ddp_backend"] = "gloo"
        trainers[algorithm] = make_trainer(folder / algorithm, algorithm, **settings)
        trainers[algorithm].train()
    return trainers


# about 20 s: two interpreters import torch and transformers
def test_two_processes_sample_and_train_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(tmp_path / "worker.py"), str(tmp_path / "two")]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (tmp_path / "two" / "losses.json").exists(), done.stderr[-4000:]
    losses = json.loads((tmp_path / "two" / "losses.json").read_text())
    for algorithm, trainer in train_together(tmp_path / "one", processes=1).items():
        assert trainer.state.global_step == 4
        assert losses[algorithm] == pytest.approx(logged(trainer, "loss"), rel=1e-4, abs=1e-6)
        one, two = (contents(tmp_path / n / algorithm / "rounds") for n in ("one", "two"))
        assert one.keys() == two.keys()
        lines = [name for name in one if name.endswith((".jsonl", "round.json"))]
        rollouts = [name for name in one if name.endswith(".parquet")]
        files = 1 if algorithm == "hypo" else 2  # whose samples are not judged
        assert len(lines + rollouts) >= 2 * (5 * files + 1), "five shards of each kind in a round"
        assert {name: one[name] for name in lines} == {name: two[name] for name in lines}
        for name in rollouts:  # all but the log-probs, which differ by rounding like the losses
            both = [tmp_path / n / algorithm / "rounds" / name for n in ("one", "two")]
            assert read_rollouts(both[0]) == read_rollouts(both[1])
