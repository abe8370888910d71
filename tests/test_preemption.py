"""SIGTERM at every stage: what is saved, how the process ends, and that nothing is lost by it.

Within this process the signal is a real one, sent from where a stage is at work. Some 50 s of CPU:
four processes that train import torch and transformers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from run_folders import contents
from safetensors.torch import load_file
from test_rounds import (
    PROMPTS,
    TOKENIZER,
    Graded,
    Make,
    brief_policy,
    equal,
    fine,
    make_trainer,
    tiny_policy,
    weights,
)
from transformers import TrainerCallback

from prefopt import preemption
from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.preemption import Preempted, wait_for_safe_points, watch_sigterm
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.log_probs import LogProbShards
from prefopt.run_lock import run_lock
from prefopt.train import read_recipe, train
from prefopt.trainers.base import TreeDataset, last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.world import build_world

pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes trainers, each in a run folder, on the same prompts and weights."""
    return lambda run="run", *args, **options: make_trainer(tmp_path / run, *args, **options)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def waiting() -> Iterator[None]:
    with watch_sigterm():
        wait_for_safe_points()
        yield


def preempted(trainer: Any, checkpoint: Path | None = None) -> Path | None:
    """Trains until SIGTERM; what a new process would go on from."""
    with waiting(), pytest.raises(Preempted):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return last_complete_checkpoint(Path(trainer.args.output_dir))


class TerminateAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            terminate()


# --- the signal ----------------------------------------------------------------------------------


def test_the_signal_is_raised_at_once_or_waits_for_a_safe_point() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_sigterm():
        with pytest.raises(Preempted):
            terminate()
        terminate()  # a second one does not interrupt what the first has begun
    assert signal.getsignal(signal.SIGTERM) is before
    with waiting():
        preemption.leave_if_asked()
        terminate()
        assert preemption.asked()
        with pytest.raises(Preempted):
            preemption.leave_if_asked()
    assert not preemption.asked()
    preemption.leave_if_asked()  # nobody watches any more


def test_an_error_is_not_taken_for_pre_emption() -> None:
    """A launcher sends SIGTERM to the others when one process fails."""
    with pytest.raises(PrefoptError), waiting():
        try:
            raise PrefoptError("another")
        finally:
            terminate()


def test_a_forked_worker_ends_as_if_nobody_watched() -> None:
    with waiting():
        child = os.fork()
        if child == 0:
            terminate()
            time.sleep(5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


# --- within a run --------------------------------------------------------------------------------


@pytest.fixture
def make_dpo(tiny_llama: Any, random_trees: Any, tmp_path: Path) -> Callable[..., DPOTrainer]:
    """DPO with dropout, whose noise a resumed run must meet again: 29 pairs, 5 steps an epoch."""

    def make(run: str, *callbacks: Any, **options: Any) -> DPOTrainer:
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / run),
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-3,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
        return DPOTrainer(
            tiny_llama(),
            DPOConfig(**config | options),
            TreeDataset(random_trees([2] * 29)),
            peft_config=adapter,
            callbacks=list(callbacks),
        )

    return make


def test_a_pre_empted_run_ends_like_an_uninterrupted_one(
    make_dpo: Callable[..., DPOTrainer],
) -> None:
    """Within an epoch and between two, where rows of the next are read before it is saved."""
    whole = make_dpo("whole")
    whole.train()
    for step in (2, 5):
        trainer = make_dpo(f"stopped-{step}", TerminateAfter(step))
        checkpoint = preempted(trainer)
        assert checkpoint is not None
        assert checkpoint.name == f"checkpoint-{step}"
        resumed = make_dpo(f"stopped-{step}")
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert equal(weights(whole.model), weights(resumed.model)), step


class TerminateWorkers(TrainerCallback):
    """Sends SIGTERM to all processes of a job, as SLURM does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            workers = [str(worker.pid) for worker in multiprocessing.active_children()]
            subprocess.run(["kill", *workers], check=True)  # torch's take it from a parent in peace
            terminate()
            time.sleep(0.2)  # for the word of a worker's death, if there is one


def test_data_workers_that_get_the_signal_too_do_not_end_the_run(
    make_dpo: Callable[..., DPOTrainer],
) -> None:
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    checkpoint = preempted(make_dpo("run", TerminateWorkers(), **options))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"


def test_a_checkpoint_that_is_there_is_not_written_again(
    make_dpo: Callable[..., DPOTrainer],
) -> None:
    trainer = make_dpo("run", TerminateAfter(2), save_strategy="steps", save_steps=2)
    saves: list[int] = []
    trainer.save_extra = lambda folder: saves.append(trainer.state.global_step)  # type: ignore[method-assign]
    with waiting(), pytest.raises(Preempted, match=r"saved at step 2 as .*checkpoint-2"):
        trainer.train()
    assert saves == [2]


def test_a_second_signal_does_not_break_the_save_and_a_kill_in_it_is_passed_over(
    make_dpo: Callable[..., DPOTrainer],
) -> None:
    whole = make_dpo("whole", max_steps=4)
    whole.train()
    again = make_dpo("run", TerminateAfter(1), max_steps=4)
    again.save_extra = lambda folder: terminate()  # type: ignore[method-assign]
    first = preempted(again)
    assert first is not None
    assert first.name == "checkpoint-1"

    class Killed(BaseException):
        """Ends everything at once, as SIGKILL does."""

    def kill(folder: Path) -> None:
        raise Killed

    killed = make_dpo("run", TerminateAfter(3), max_steps=4)
    killed.save_extra = kill  # type: ignore[method-assign]
    with waiting(), pytest.raises(Killed):
        killed.train(resume_from_checkpoint=str(first))
    assert last_complete_checkpoint(Path(killed.args.output_dir)) == first
    resumed = make_dpo("run", max_steps=4)
    resumed.train(resume_from_checkpoint=str(first))
    assert equal(weights(whole.model), weights(resumed.model))


def test_reference_log_probs_stop_between_shards(
    make_dpo: Callable[..., DPOTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 29 pairs in shards of eight; SIGTERM comes while the second is written."""
    written: list[int] = []

    class Small(LogProbShards):
        def __init__(self, folder: Path, sizes: Any) -> None:
            super().__init__(folder, sizes, trees_per_shard=8)

        def write(self, shard: int, values: torch.Tensor) -> None:
            super().write(shard, values)
            written.append(shard)
            if len(written) == 2:
                terminate()

    monkeypatch.setattr("prefopt.trainers.reference.LogProbShards", Small)
    assert preempted(make_dpo("run", max_steps=1)) is None
    assert written == [0, 1]
    make_dpo("run", max_steps=1).train()
    assert written == [0, 1, 2, 3]


class Asked(Graded):
    """Sends SIGTERM while it scores for the nth time."""

    def __init__(self, at: int) -> None:
        super().__init__(fine)
        self.at, self.calls = at, 0

    def score(self, prompts: Any, completions: Any, **columns: Any) -> np.ndarray:
        self.calls += 1
        if self.calls == self.at:
            terminate()
        return super().score(prompts, completions)


class AskedEngine(TransformersEngine):
    """Sends SIGTERM while it generates for the nth time."""

    at, calls = 0, 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            terminate()
        return super().generate(*args, **kwargs)


def collecting(make: Make, run: str, algorithm: str, *, engine: int = 0, judge: int = 0) -> Any:
    """Two rounds of four prompts, a shard each; nothing is saved but by the signal."""
    policy = brief_policy() if algorithm == "ppo" else tiny_policy()
    samples = AskedEngine(policy, TOKENIZER)
    samples.at = engine
    more = {"prompts_per_round": 4} if algorithm == "ppo" else {}
    return make(
        run,
        algorithm,
        model=policy,
        engine=samples,
        judge=Asked(judge),
        prompts=PROMPTS[:8],
        prompts_per_shard=1,
        **more,
    )


@pytest.mark.parametrize("algorithm", ["online_dpo", "ppo"])
@pytest.mark.parametrize("stage", ["engine", "judge"])
def test_collecting_stops_between_shards_and_goes_on_with_the_next(
    make: Make, algorithm: str, stage: str
) -> None:
    """In the second of the four shards of the second round, after the steps of the first."""
    whole = collecting(make, "whole", algorithm)
    whole.train()
    calls = Counter(engine=whole.engine.calls, judge=whole.judge.calls)
    assert calls == {"engine": 8, "judge": 8}
    first = collecting(make, "run", algorithm, **{stage: 6})
    checkpoint = preempted(first)
    assert checkpoint is not None, "the steps of the first round are saved"
    assert checkpoint.name == f"checkpoint-{first.state.global_step}"
    resumed = collecting(make, "run", algorithm)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    done = Counter(engine=first.engine.calls, judge=first.judge.calls)
    done.update(engine=resumed.engine.calls, judge=resumed.judge.calls)
    assert done == calls, "nothing is made twice"
    assert getattr(first, stage).calls == 6
    assert contents(whole.rounds_dir) == contents(resumed.rounds_dir)
    assert equal(weights(whole.model), weights(resumed.model))


def test_mirror_prox_saves_no_policy_that_is_half_a_phase_further(make: Make) -> None:
    """As a phase begins the policy is put back, before it samples: that is no step's policy."""
    options = {
        "mode": "mirror_prox",
        "phase_rounds": 2,
        "rounds": 4,
        "prompts": PROMPTS[:8],
        "per_device_train_batch_size": 2,
    }

    def attempt(run: str, at: int) -> Any:
        policy = brief_policy()
        engine = AskedEngine(policy, TOKENIZER)
        engine.at = at
        return make(run, "nash_mp", model=policy, engine=engine, **options)

    whole = attempt("whole", 0)
    whole.train()
    per_round = whole.engine.calls // 4
    stopped = attempt("run", 2 * per_round + 1)
    assert preempted(stopped) is None
    assert stopped.state.global_step > 0
    resumed = attempt("run", 0)
    resumed.train()
    assert equal(weights(whole.model), weights(resumed.model))


# --- processes -----------------------------------------------------------------------------------


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    world = build_world(folder / "world", sft_rows=1, preference_rows=400, prompt_rows=1)
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{path: {world.base}}}\ndata: {{path: {world.preferences}}}\n"
        "trainer: {algorithm: dpo, per_device_train_batch_size: 4, learning_rate: 1.0e-3,"
        " logging_steps: 1, save_strategy: 'no', max_steps: 60}\n"
    )
    return path


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes have it: sums of more threads are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prefopt", "train", str(recipe), f"run_dir={run}", *overrides]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def terminate_when(process: subprocess.Popen[str], seen: Callable[[], bool]) -> tuple[int, str]:
    while process.poll() is None and not seen():
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def test_the_command_exits_with_75_and_goes_on(
    recipe: Path, tmp_path: Path, one_thread: None
) -> None:
    """SIGTERM while it loads, then while it trains; then it is let go on to its end."""
    run = tmp_path / "run"
    code, said = terminate_when(start(recipe, run), (run / ".lock").exists)
    assert code == 75, said
    assert "pre-empted by SIGTERM: nothing was trained since the last start" in said
    metrics = run / "metrics.jsonl"
    code, said = terminate_when(
        start(recipe, run), lambda: metrics.exists() and metrics.read_text().count("\n") > 3
    )
    assert code == 75, said
    checkpoint = last_complete_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    step = int(checkpoint.name.rsplit("-", 1)[1])
    assert 3 < step < 60
    assert f"pre-empted by SIGTERM: saved at step {step} as {checkpoint}; the same comm" in said
    assert not (run / "final").exists()
    for name in ("run", "whole"):
        train(read_recipe(recipe, [f"run_dir={tmp_path / name}"]))
    a, b = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert lines == list(range(1, 61))


WORKER = """
import json, os, signal, sys
from pathlib import Path

import torch.distributed as dist
from test_preemption import TerminateAfter, waiting
from test_rounds import PROMPTS, Graded, equal, fine, make_trainer, weights

from prefopt.preemption import Preempted

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
told = []


class Asked(Graded):
    calls = 0

    def score(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls == 3 and rank == 1:  # of the second round
            os.kill(os.getpid(), signal.SIGTERM)
        return super().score(prompts, completions)


for run, judge, callbacks in (
    ("step", Graded(fine), [TerminateAfter(2)] if rank == 1 else []),
    ("judge", Asked(fine), []),
):
    trainer = make_trainer(folder / run, judge=judge, callbacks=callbacks, prompts=PROMPTS[:8],
                           prompts_per_shard=1, per_device_train_batch_size=1, ddp_backend="gloo")
    try:
        with waiting():
            trainer.train()
    except Preempted as stop:
        told.append(f"{run}: {stop}")
ends = []
for run in ("whole", "step"):
    trainer = make_trainer(folder / run, prompts=PROMPTS[:8], prompts_per_shard=1,
                           per_device_train_batch_size=1, ddp_backend="gloo")
    newest = trainer.newest_checkpoint()
    trainer.train(resume_from_checkpoint=newest and str(newest))
    ends.append(weights(trainer.model))
told.append(equal(*ends))
everyone = [None] * 2
dist.all_gather_object(everyone, told)
if rank == 0:
    (folder / "everyone.json").write_text(json.dumps(everyone))
dist.barrier()
os._exit(0)  # gloo's threads sometimes abort while the interpreter shuts down
"""


def test_all_processes_end_where_one_is_asked(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(tmp_path / "worker.py"), str(tmp_path)],
        env=ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = json.loads((tmp_path / "everyone.json").read_text())
    assert first == second
    assert first[0] == f"step: saved at step 2 as {tmp_path}/step/checkpoint-2"
    assert first[1].startswith("judge: saved at step 4 as ")
    assert first[2], "what goes on ends like a run that was not interrupted"
    judged = list((tmp_path / "judge" / "rounds" / "0001" / "draw-0").glob("judgements-*"))
    assert 1 <= len(judged) < 4, "the second process left two shards of its own behind"


# --- one process a run folder --------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path

from prefopt.run_lock import run_lock

with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_folder_is_held_by_one_process(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = holder(run)
    (run / "metrics.jsonl").touch()
    refused = pytest.raises(PrefoptError, match=rf"process {process.pid} on .*since .*run_dir")
    for _ in range(2):  # being refused changes nothing
        with refused, run_lock(run):
            pass
    process.kill()
    process.communicate()
    with run_lock(run):  # a killed process holds nothing
        other = tmp_path / "other"
        with run_lock(other):
            pass
        assert not other.exists(), "nothing was written there"
    assert (run / ".lock").exists()


def test_train_and_quickstart_are_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    process = holder(run)
    commands = (
        ["train", str(recipe), f"run_dir={run}"],
        ["quickstart", "--out", str(run), "--algorithms", "dpo"],
    )
    for command in commands:
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"error: {run}: process {process.pid} on " in said
    process.communicate("")
    assert not run.exists(), "nothing was written there"


def test_a_guard_may_change_between_two_starts(recipe: Path, tmp_path: Path) -> None:
    options = [f"run_dir={tmp_path / 'run'}", "trainer.max_steps=1", "trainer.save_strategy=steps"]
    train(read_recipe(recipe, options))
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "final")
    train(read_recipe(recipe, [*options, "guards.max_kl=3", "guards.action=warn"]))
    assert (tmp_path / "run" / "final").exists()
