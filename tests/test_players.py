"""Engines with weights of their own: pushes, the check after them, and sampling a round ahead."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from run_folders import contents
from test_rounds import (
    TOKENIZER,
    Make,
    Steps,
    equal,
    logged,
    make_trainer,
    samples,
    tiny_policy,
    weights,
)
from torch import Tensor
from transformers import TrainerCallback

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.eval.report import write_report
from prefopt.models.forward import enable_trees
from prefopt.models.logprobs import token_log_probs_of
from prefopt.rollout import Completion, SamplingSettings
from prefopt.rollout.engine import Done
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.storage import atomic_write
from prefopt.trainers.checkpoints import last_complete_checkpoint


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


class Apart:
    """An engine on a model of its own, which has what was pushed and nothing else."""

    def __init__(self, *, elsewhere: bool = False, continuous: bool = True) -> None:
        self.elsewhere, self.continuous = elsewhere, continuous
        self.model = tiny_policy()
        enable_trees(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)
        self.engine = TransformersEngine(self.model, TOKENIZER)
        self.log: list[str] = []
        self.held: list[dict[str, Tensor]] = []  # the weights of each call
        self.threads: set[str] = set()
        self.slow = 0.0

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.log.append("push")
        self.model.load_state_dict(dict(weights))

    def log_probs(self, sequences: Sequence[Sequence[int]]) -> list[list[list[float]]]:
        self.log.append("log_probs")
        trees = [PromptTree(ids[:1], [ids[1:]]) for ids in sequences]
        with torch.no_grad():
            values = token_log_probs_of(self.model, collate_trees(trees))
        return [[part.tolist() for part in values.split([len(ids) - 1 for ids in sequences])]]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        self.log.append("generate")
        self.threads.add(threading.current_thread().name.split("_")[0])
        self.held.append(weights(self.model))
        time.sleep(self.slow)
        return self.engine.generate(prompts, settings, done=done)

    def release(self) -> None:
        self.log.append("release")


# --- pushes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["online_dpo", "nash_mp", "ppo"])
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_pushed_weights_sample_as_live_ones_do(make: Make, algorithm: str, adapter: Any) -> None:
    """With an adapter to rounding: there the pushed weights are merged."""
    options: dict[str, Any] = {"peft_config": adapter, "rounds": 3, "learning_rate": 1e-3}
    live = make("live", algorithm, **options)
    live.train()
    engine = Apart()
    pushed = make("pushed", algorithm, engine=engine, **options)
    pushed.train()
    rounds = ["push", "log_probs", "generate", "release"] * 3
    assert engine.log == ["push", "log_probs", *rounds], "other weights before the first"
    for index in range(3):
        ours, theirs = (samples(t.rounds_dir / f"{index:04d}") for t in (pushed, live))
        assert ours == theirs
    if adapter is None:
        assert equal(weights(pushed.model), weights(live.model))
    lines = [line for line in pushed.state.log_history if "push/gap" in line]
    assert len(lines) == 3
    assert max(line["push/gap"] for line in lines) < 1e-5
    assert min(line["time/push"] for line in lines) > 0


def test_an_engine_is_asked_once_for_a_whole_round(make: Make) -> None:
    engines = {kind: Apart(continuous=kind) for kind in (True, False)}
    for kind, engine in engines.items():
        make(f"{kind}", rounds=2, prompts_per_shard=2, engine=engine).train()
    assert engines[True].log.count("generate") == 2
    assert engines[False].log.count("generate") == 6, "a call for each shard"
    assert [engine.log.count("push") for engine in engines.values()] == [3, 3]


def test_of_two_players_on_one_model_a_shard_is_kept_before_the_next(make: Make) -> None:
    class Halting(TransformersEngine):
        calls = 0

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise PrefoptError("stopped")
            return super().generate(*args, **kwargs)

    options = {"mode": "mirror_prox", "phase_rounds": 1, "rounds": 2, "prompts_per_shard": 2}
    policy = tiny_policy()
    trainer = make("run", "nash_mp", model=policy, engine=Halting(policy, TOKENIZER), **options)
    with pytest.raises(PrefoptError, match="stopped"):
        trainer.train()
    assert len(list(trainer.rounds_dir.glob("0000/draw-0/rollouts-*"))) == 1


def test_both_players_of_mirror_prox_sample_from_their_own_weights(make: Make) -> None:
    options = {"mode": "mirror_prox", "phase_rounds": 1, "rounds": 4, "learning_rate": 1e-2}
    engine, steps = Apart(), Steps()
    pushed = make("pushed", "nash_mp", engine=engine, callbacks=[steps], **options)
    pushed.train()
    make("live", "nash_mp", **options).train()
    own, opponents = engine.held[0::2], engine.held[1::2]
    per_round = len(steps.before) // 4
    begins = steps.before[::per_round]
    assert all(equal(a, b) for a, b in zip(own, begins, strict=True))
    assert not equal(own[1], opponents[1])
    assert equal(opponents[1], steps.after[per_round - 1]), "the half step"
    live = pushed.rounds_dir.parents[1] / "live" / pushed.rounds_dir.name
    for index in range(4):
        assert samples(pushed.rounds_dir / f"{index:04d}") == samples(live / f"{index:04d}")


class Forgetful(Apart):
    """Begins with the policy's weights, as a server does, and never takes one of them over."""

    forgotten = ""

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if not self.log:
            self.model.load_state_dict(tiny_policy().state_dict())
        self.log.append("push")
        kept = {name: weight for name, weight in weights if name != self.forgotten}
        self.model.load_state_dict(kept, strict=False)


@pytest.mark.parametrize("forgotten", ["lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_forgotten_stops_the_run_at_once(make: Make, forgotten: str) -> None:
    """At any learning rate: here it would still be right, and later stale by next to nothing."""
    engine = Forgetful()
    trainer = make(engine=engine, learning_rate=5e-7)
    trainer.train()
    engine.forgotten, engine.log = forgotten, []
    again = make("again", engine=engine, learning_rate=5e-7)
    with pytest.raises(PrefoptError, match=r"differ by [0-9.]+ nats a token \(at most"):
        again.train()
    assert not list(again.rounds_dir.glob("0000/draw-0/*")), "nothing was sampled from it"


def test_log_probs_that_are_no_numbers_stop_the_run(make: Make) -> None:
    class Empty(Apart):
        def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
            list(weights)

    with pytest.raises(PrefoptError, match="differ by inf"):
        make(engine=Empty()).train()


def test_the_engine_gives_memory_back_when_sampling_fails(make: Make) -> None:
    class Failing(Apart):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise PrefoptError("no answer")

    engine = Failing()
    with pytest.raises(PrefoptError, match="no answer"):
        make(engine=engine).train()
    assert engine.log[-1] == "release"


def test_shards_are_on_disk_as_soon_as_they_are_complete(make: Make) -> None:
    """Of one call for the whole round: what ends before a failure is not sampled again."""

    class Halting(Apart):
        halts = True

        def generate(self, prompts: Any, settings: Any, *, done: Any) -> Any:
            told = 0

            def halting(index: int, group: list[Completion]) -> None:
                nonlocal told
                told += 1
                if self.halts and told > 7:
                    raise PrefoptError("stopped")
                done(index, group)

            return super().generate(prompts, settings, done=halting)

    engine = Halting()
    engine.engine = TransformersEngine(engine.model, TOKENIZER, batch_size=2)
    options: dict[str, Any] = {"rounds": 1, "prompts_per_shard": 3, "engine": engine}
    trainer = make(**options)
    with pytest.raises(PrefoptError, match="stopped"):
        trainer.train()
    kept = contents(trainer.rounds_dir / "0000")
    assert 0 < len(kept) < 4
    engine.halts = False
    make(**options).train()
    found = contents(trainer.rounds_dir / "0000")
    assert all(found[name] == content for name, content in kept.items())
    whole = make("whole", rounds=1, prompts_per_shard=3, engine=Apart())
    whole.train()
    assert samples(whole.rounds_dir / "0000") == samples(trainer.rounds_dir / "0000")


# --- a round ahead -------------------------------------------------------------------------------

OVERLAP: dict[str, Any] = {"overlap": True, "rounds": 4, "learning_rate": 1e-2}


@pytest.mark.parametrize("algorithm", ["online_dpo", "inpo"])
def test_a_round_is_sampled_from_the_policy_as_the_one_before_began(
    make: Make, algorithm: str
) -> None:
    engine, steps = Apart(elsewhere=True), Steps()
    trainer = make("run", algorithm, engine=engine, callbacks=[steps], **OVERLAP)
    trainer.train()
    firsts = [steps.before[k] for k in range(len(steps.before)) if is_first(trainer, k)]
    assert len(firsts) == 4
    expected = [firsts[0], *firsts[:3]]
    assert [equal(a, b) for a, b in zip(engine.held, expected, strict=True)] == [True] * 4
    assert not equal(firsts[0], firsts[1])
    assert engine.threads == {"MainThread", "sampling"}
    rounds = [line for line in trainer.state.log_history if "staleness" in line]
    per_round = trainer.state.global_step // 4
    assert [line["staleness"] for line in rounds] == [0] + [per_round] * 3
    assert "kl" not in rounds[1], "of a policy that is not at hand"


def is_first(trainer: Any, step: int) -> bool:
    return step % (trainer.state.global_step // 4) == 0


class Slow(TrainerCallback):
    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        time.sleep(0.15)


@pytest.mark.parametrize("saving", ["no", "epoch"])
def test_the_time_that_was_saved_is_said(make: Make, tmp_path: Path, saving: str) -> None:
    engine = Apart(elsewhere=True)
    engine.slow = 0.3
    options = {"save_strategy": saving, "logging_steps": 100}
    trainer = make(engine=engine, callbacks=[Slow()], **OVERLAP | options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "time/saved" in line]
    assert len(lines) == 3
    for line in lines:
        assert 0.1 < line["time/saved"] <= line["time/ahead"]
    log = [{"step": line["step"], **line} for line in trainer.state.log_history]
    text = "".join(json.dumps(line) + "\n" for line in log)
    atomic_write(tmp_path / "page" / "metrics.jsonl", text)
    page = write_report(tmp_path / "page").read_text()
    assert "sampling the next round beside training saved" in page
    assert "pairs were one round old, up to 2 optimiser steps" in page


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 7])
def test_a_run_that_is_a_round_ahead_goes_on_as_if_uninterrupted(make: Make, stop: int) -> None:
    class StoppedError(Exception):
        pass

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise StoppedError

    options = {**OVERLAP, "save_strategy": "steps", "save_steps": 3, "prompts_per_shard": 1}
    whole = make("whole", engine=Apart(elsewhere=True), **options)
    whole.train()
    assert whole.state.global_step == 8
    first = make("run", engine=Apart(elsewhere=True), callbacks=[Stop()], **options)
    with pytest.raises(StoppedError):
        first.train()
    first.ahead.wait()
    # as if the process had been killed while the next round was being sampled
    newest = max(first.rounds_dir.glob("0*"))
    drawn = sorted(newest.glob("draw-0/rollouts-*"))
    checkpoint = last_complete_checkpoint(Path(first.args.output_dir))
    saved = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
    if int(newest.name) > saved // 2 + 1:
        for path in drawn[1:]:
            path.unlink()
    second = make("run", engine=Apart(elsewhere=True), **options)
    second.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert equal(weights(second.model), weights(whole.model))
    ours, theirs = (contents(trainer.rounds_dir) for trainer in (second, whole))
    assert ours.keys() == theirs.keys()
    exact = ("pairs.jsonl", "judgements")  # batches differ, and the sampler's log-probs with them
    assert all(ours[name] == theirs[name] for name in ours if any(e in name for e in exact))
    for index in range(4):
        drawn, expected = (samples(t.rounds_dir / f"{index:04d}") for t in (second, whole))
        assert drawn == expected


def test_a_failure_ahead_is_the_runs(make: Make) -> None:
    class Failing(Apart):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise PrefoptError("the server is gone")
            return super().generate(*args, **kwargs)

    trainer = make(engine=Failing(elsewhere=True), save_strategy="epoch", **OVERLAP)
    with pytest.raises(PrefoptError, match="the server is gone"):
        trainer.train()
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    assert checkpoint is not None, "what was trained is kept"
    assert checkpoint.name == "checkpoint-2"


def test_no_round_is_sampled_that_is_not_trained_on(make: Make) -> None:
    engine = Apart(elsewhere=True)
    trainer = make(engine=engine, max_steps=4, **OVERLAP)
    trainer.train()
    assert trainer.state.global_step == 4
    assert sorted(path.name for path in trainer.rounds_dir.glob("0*")) == ["0000", "0001"]


def test_a_run_that_fails_does_not_wait_for_what_is_sampled(tmp_path: Path) -> None:
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_players import Apart, OVERLAP, make_trainer
from transformers import TrainerCallback

class Fail(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        engine.slow = 600
        if kwargs.get("model") is not None and engine.log.count("generate") == 2:
            raise RuntimeError("as training may")

class Slow(Apart):
    def generate(self, *args, **kwargs):
        self.slow = 600 if "generate" in self.log else 0
        return super().generate(*args, **kwargs)

engine = Slow(elsewhere=True)
make_trainer(Path({str(tmp_path)!r}), engine=engine, callbacks=[Fail()], **OVERLAP).train()
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "as training may" in result.stderr


@pytest.mark.parametrize(
    ("algorithm", "engine", "options", "message"),
    [
        ("online_dpo", None, {}, "overlap: found TransformersEngine, which samples on the devices"),
        ("online_dpo", Apart(), {}, "overlap: found Apart"),
        ("nash_mp", Apart(elsewhere=True), {}, "follows a gradient of the policy's own samples"),
        ("online_dpo", Apart(elsewhere=True), {"ties": "resample"}, "ties=resample"),
    ],
)
def test_overlap_is_refused_where_it_cannot_be(
    make: Make, algorithm: str, engine: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrefoptError, match=message):
        make("run", algorithm, engine=engine, **OVERLAP | options)


def test_without_overlap_nothing_is_ahead(make: Make) -> None:
    engine = Apart(elsewhere=True)
    trainer = make(engine=engine, rounds=2)
    trainer.train()
    assert engine.threads == {"MainThread"}
    assert not any("time/saved" in line for line in trainer.state.log_history)
    assert math.isfinite(logged(trainer, "loss")[0])
