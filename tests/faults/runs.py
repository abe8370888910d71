"""Tiny runs of all trainers, started in no time, and what is owed to a run that met a fault.

A process that imports torch and transformers takes seconds; one that is forked from a process that
has them takes none, and is a process like any other: it runs ``prefopt train``, writes to disk and
dies of a SIGKILL. Nothing is trained in the process that is forked.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_folders import beside_the_policy, complete, is_partial
from transformers import AutoModelForCausalLM

from prefopt.cli import main
from prefopt.errors import PrefoptError
from prefopt.models.load import load_reward_model
from prefopt.rounds.store import read_lines
from prefopt.trainers.checkpoints import last_complete_checkpoint, step_of
from prefopt.world import build_world
from prefopt.world.tokenizer import world_tokenizer

TIMEOUT = 600.0  # seconds after which a run of three is said to hang; the machine may be busy
TESTS = Path(__file__).parents[1]

EVALUATED = "eval={{prompts: {folder}/world/prompts.jsonl, max_new_tokens: 8}}"
COMPARED = "judge={{kind: preference_model, path: {folder}/policy}}"
# the name of a run -> how its recipe differs from that of ``prepare``
CASES: dict[str, tuple[str, ...]] = {
    # the last step lies within an epoch
    "dpo": ("trainer.algorithm=dpo", "trainer.num_train_epochs=1.6", EVALUATED),
    "online_dpo": ("trainer.algorithm=online_dpo", "trainer.rounds=3", EVALUATED),
    "hypo": ("trainer.algorithm=hypo", "trainer.kl_weight=0.1"),
    "inpo": (
        "trainer.algorithm=inpo",
        "trainer.rounds=4",
        "trainer.num_train_epochs=2",
        "trainer.save_strategy=epoch",
        "model.lora={{r: 4}}",
        COMPARED,
    ),
    "nash_mp": ("trainer.algorithm=nash_mp",),
    "mirror_prox": (
        "trainer.algorithm=nash_mp",
        "trainer.mode=mirror_prox",
        "trainer.phase_rounds=2",
        "trainer.rounds=8",
        COMPARED,
    ),
    "drpo": (
        "trainer.algorithm=drpo",
        "trainer.num_train_epochs=2",
        "trainer.reset_probability=0.7",
    ),
    "ppo": ("trainer.algorithm=ppo", "trainer.num_train_epochs=2"),
}


def trainer_of(case: str) -> str:
    """The trainer that a run shows: two runs show Nash-MP."""
    return CASES[case][0].partition("=")[2]


def prepare(folder: Path) -> None:
    """Writes the world, a policy whose answers end soon, a judge, and the recipe of all runs."""
    tokenizer = world_tokenizer()
    world = build_world(folder / "world", sft_rows=1, preference_rows=36, prompt_rows=8)
    policy = AutoModelForCausalLM.from_pretrained(world.base)
    stops = [tokenizer.eos_token_id, *range(8, len(tokenizer), 5)]
    policy.generation_config.eos_token_id = stops
    torch.manual_seed(0)  # of the judge's head
    judge = load_reward_model(str(world.base), tokenizer, new_head=True)
    for model, name in ((policy, "policy"), (judge, "judge")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "recipe.yaml").write_text(
        f"""
        model: {{path: {folder}/policy}}
        data: {{path: {world.preferences}}}
        judge: {{kind: reward_model, path: {folder}/judge}}
        rollout: {{samples_per_prompt: 4, max_new_tokens: 12, batch_size: 16}}
        trainer:
          algorithm: dpo
          per_device_train_batch_size: 4
          prompts_per_shard: 2
          learning_rate: 1.0e-3
          logging_steps: 1
          save_strategy: steps
          save_steps: 3
        """
    )


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to.

    Attributes:
        run: Its folder.
        seconds: How long it took.
        writes: How often it made, wrote, renamed or removed a file or folder.
    """

    run: Path
    seconds: float
    writes: int


@dataclass(frozen=True)
class Bench:
    """What faults are injected into.

    Attributes:
        folder: That of ``prepare``; runs go there too.
        whole: An uninterrupted run of each case.
        seed: Of all random choices.
        imports: Seconds that a process takes to import what it needs.
    """

    folder: Path
    whole: Mapping[str, Whole]
    seed: int
    imports: float

    def command(self, case: str, run: Path) -> list[str]:
        """The words after ``prefopt`` of a case's run in a folder."""
        overrides = [text.format(folder=self.folder) for text in CASES[case]]
        return ["train", str(self.folder / "recipe.yaml"), f"run_dir={run}", *overrides]

    def start(self, case: str, run: Path, watch: int = 0) -> Run:
        """Starts a run, or goes on with it; see :func:`fork`."""
        return fork(self.command(case, run), run, self.log(run), watch)

    def log(self, run: Path) -> Path:
        """A new file for what a process of a run says; never on a disk that fills up."""
        folder = self.folder / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{'-'.join(run.relative_to(self.folder).parts)}-{time.monotonic_ns()}"

    def finish(self, case: str, run: Path) -> Ended:
        """Starts a run, or goes on with it, and waits for its end."""
        return self.start(case, run).wait()


@dataclass(frozen=True)
class Moment:
    """A moment in the life of a process, on one of two clocks.

    Attributes:
        seconds: Since it was started, or since its write of that number.
        write: The number of a write, from 1; 0: none.
    """

    seconds: float
    write: int = 0


def random_moment(chance: random.Random, whole: Whole, clock: str) -> Moment:
    """A moment that is uniform over the life of a run: over its time, or over its writes.

    Much of a run's time is loading, and its checkpoints are written within a few thousandths of
    it; by its writes they are met as often as they are many.
    """
    if clock == "time":
        return Moment(chance.uniform(0, whole.seconds))
    between = whole.seconds / whole.writes
    return Moment(chance.uniform(0, 2 * between), chance.randint(1, whole.writes))


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal's number), stderr, and its seconds."""

    code: int
    stderr: str
    seconds: float

    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def refusal(self) -> str | None:
        """The error, where the command ended with one line and exit code 2; else None."""
        clear = self.code == 2 and len(self.errors()) == 1 and "Traceback" not in self.stderr
        return self.errors()[0] if clear else None

    def __str__(self) -> str:
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return f"exit {self.code}: {' | '.join(self.errors() or lines[-2:])[:600]}"


class Run:
    """A running process, forked or started by its full command line."""

    def __init__(self, pid: int, events: int | None, log: Path) -> None:
        self.pid, self.events, self.log = pid, events, log
        self.began, self.clock = time.time_ns(), time.perf_counter()
        self.code: int | None = None
        self.ended: Ended | None = None

    def reach(self, moment: Moment) -> bool:
        """Waits for a moment; False if the process ended before."""
        if moment.write:
            assert self.events is not None
            ready, _, _ = select.select([self.events], [], [], TIMEOUT)
            if not ready or not os.read(self.events, 1):  # at its end there is nothing to read
                return False
        until = moment.seconds + (time.perf_counter() if moment.write else self.clock)
        while not self.has_ended() and time.perf_counter() < until:
            time.sleep(min(0.001, max(0.0, until - time.perf_counter())))
        return not self.has_ended()

    def has_ended(self) -> bool:
        """Whether it has; never waits."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to it, unless it has ended."""
        if not self.has_ended():
            os.kill(self.pid, number)

    def stop(self) -> None:
        """Stops it and waits until it stands still."""
        self.send(signal.SIGSTOP)
        while not self.has_ended() and self._state() != "T":
            time.sleep(0.0005)

    def _state(self) -> str:
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return ""
        return stat.rpartition(") ")[2][:1]

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Waits for its end; one that takes too long is killed, and its code says so."""
        if self.ended is not None:
            return self.ended
        until = time.perf_counter() + timeout
        while not self.has_ended():
            if time.perf_counter() > until:
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        if self.events is not None:
            os.close(self.events)
            self.events = None
        assert self.code is not None
        text = self.log.read_text(errors="replace")
        self.ended = Ended(self.code, text, time.perf_counter() - self.clock)
        return self.ended

    def kill(self) -> None:
        """Kills it and waits until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()


def fork(words: list[str], run: Path, log: Path, watch: int = 0) -> Run:
    """Runs ``prefopt`` in a process of its own.

    Args:
        words: What follows ``prefopt`` on the command line.
        run: The run folder.
        log: The file for what the process says.
        watch: The write, from 1, that the process tells of; 0: none, and it tells how many it made.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _child(words, run, log, writing, watch)
    os.close(writing)
    return Run(pid, reading, log)


def _child(words: list[str], run: Path, log: Path, pipe: int, watch: int) -> None:
    """What the forked process does; it does not return."""
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        # nothing may hang on generators that happen to be as they were in the process forked from
        random.seed()
        np.random.seed()
        torch.seed()
        sys.argv = ["prefopt", *words]
        count = _count_writes(run, lambda n: os.write(pipe, b"w") if n == watch else None)
        code = main(words)
        if not watch:
            os.write(pipe, f"{count()}\n".encode())
    except BaseException:  # noqa: BLE001 as Python's own last resort does
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_writes(run: Path, tell: Callable[[int], object]) -> Callable[[], int]:
    """Counts what this process does to files and folders of a run, as Python tells of it."""
    made, folder = 0, str(run)

    def changes(event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            path, _, flags = args
            return bool(flags & (os.O_WRONLY | os.O_RDWR)) and str(path).startswith(folder)
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            path = str(args[0])  # relative only while a tree is removed
            return path.startswith(folder) or not path.startswith("/")
        return False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal made
        if changes(event, args):
            made += 1
            tell(made)

    sys.addaudithook(hook)
    return lambda: made


def run_whole(bench: Bench, case: str) -> Whole:
    """Runs a case to its end, undisturbed."""
    run = bench.folder / "whole" / case
    process = bench.start(case, run)
    assert process.events is not None
    counted = os.dup(process.events)
    ended = process.wait()
    if ended.code:
        raise RuntimeError(f"{case}: a run that nothing happens to ends with {ended}")
    steps = [line["step"] for line in lines_of_log(run) if "loss" in line]
    if steps != list(range(1, len(steps) + 1)):
        raise RuntimeError(f"{case}: logs the steps {steps}, expected each once and in order")
    writes = int(os.read(counted, 32))
    os.close(counted)
    return Whole(run, ended.seconds, writes)


def command_line(words: list[str], log: Path) -> Run:
    """Runs ``python -m prefopt``: imports and all, and its own order of hashed strings."""
    arguments = [sys.executable, "-m", "prefopt", *words]
    outputs = [
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return Run(os.posix_spawn(arguments[0], arguments, os.environ, file_actions=outputs), None, log)


def scaled(number: int, scale: float) -> int:
    """A share of a number of faults, at least one."""
    return max(1, round(number * scale))


# --- what is owed --------------------------------------------------------------------------------


def differences(run: Path, whole: Path) -> list[str]:
    """In what a run that has ended differs from the same run without faults; nothing but time may.

    The model, the rounds, log-probs and evaluations, byte by byte; what the last checkpoint holds
    beside the policy; every line of the log, each step once; the summary.
    """
    found = []
    for name in ("final", "adapter", "rounds", "log_probs", "evaluations"):
        ours, theirs = (complete(folder / name) for folder in (run, whole))
        for file in sorted(ours.keys() | theirs.keys()):
            if ours.get(file) != theirs.get(file):
                state = "is gone" if file not in ours else "differs" if file in theirs else "is new"
                found.append(f"{name}/{file} {state}")
    if beside_the_policy(run) != beside_the_policy(whole):
        found.append("what the last checkpoint holds beside the policy differs")
    try:
        same = lines_of_log(run) == lines_of_log(whole)
    except PrefoptError:  # a damaged file, which a run that was complete does not read again
        same = False
    if not same:
        found.append("metrics.jsonl differs")
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (run, whole)]
    if ends[0] | {"seconds": 0} != ends[1] | {"seconds": 0}:
        found.append("summary.json differs")
    return found


def lines_of_log(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what tells the time."""
    if not (run / "metrics.jsonl").exists():
        return []
    return [
        {name: value for name, value in line.items() if not _tells_time(name)}
        for line in read_lines(run / "metrics.jsonl")
    ]


def _tells_time(name: str) -> bool:
    return name.startswith("time/") or name == "tokens_per_second"


def leftovers(run: Path) -> list[str]:
    """What a run that has ended has left half-written."""
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if is_partial(p.name))


def step_of_checkpoint(run: Path) -> int:
    """The step of the last complete checkpoint; 0 without one."""
    last = last_complete_checkpoint(run / "checkpoints")
    return 0 if last is None else step_of(last)
