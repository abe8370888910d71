"""The folder of a run: its recipe, its environment, its metrics, its checkpoints, its result."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from prefopt.determinism import circumstances, determinism
from prefopt.errors import PrefoptError
from prefopt.recipe import Recipe, load_recipe
from prefopt.rounds.facts import FORMAT, differences, listed, read_facts
from prefopt.rounds.storage import append, atomic_write, remove_partial
from prefopt.trainers.checkpoints import last_complete_checkpoint

# where samples are drawn, and how weights get there, may change between two starts of a run
PLACES = {
    "eval.judge.concurrency",
    "eval.judge.key_variable",
    "judge.gpu_memory",
    "rollout.gpu_memory",
    "rollout.servers",
    "rollout.transfer",
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def check_run(recipe: Recipe) -> None:
    """Refuses to go on with what another recipe has sampled or trained.

    Raises:
        PrefoptError: The folder holds rounds, checkpoints or the result of another recipe, or what
            a newer version has written.
    """
    folder = Path(recipe.run_dir)
    _facts(folder / "data.json")
    stored = folder / "recipe.yaml"
    begun = (folder / "summary.json").exists() or _has_rounds(folder)
    trained = begun or last_complete_checkpoint(folder / "checkpoints")
    if not trained or not stored.exists():
        return
    try:
        before = load_recipe(stored)
    except PrefoptError as error:
        raise PrefoptError(
            f"{error}; restore the file, or, if the recipe is as it was, delete it"
        ) from error
    changes = differences(before.resolved(), recipe.resolved())
    # what a run is watched for may change too: a guard that has ended it is set anew
    different = {
        key: change
        for key, change in changes
        if key not in PLACES and not key.startswith("guards.")
    }
    if different:
        raise PrefoptError(
            f"{stored}: this run was begun with other values of {listed(different)}; "
            "restore them, choose another run_dir, or delete the folder to begin again"
        )


def open_run(recipe: Recipe, data: Mapping[str, Any]) -> None:
    """Writes the resolved recipe, the environment and the facts about the data of a run.

    What killed processes left half-written in its folder is removed.

    Args:
        recipe: The recipe.
        data: What a resumed run must find unchanged, as plain values.

    Raises:
        PrefoptError: There are checkpoints or rounds that were made of other data.
    """
    folder = Path(recipe.run_dir)
    facts = folder / "data.json"
    begun = last_complete_checkpoint(folder / "checkpoints") or _has_rounds(folder)
    if begun and (found := _facts(facts)):
        found.pop("format", None)
        if different := dict(differences(found, data)):
            raise PrefoptError(
                f"{facts}: this run was begun with other {listed(different)}; "
                "restore what was there, or choose another run_dir"
            )
    remove_partial(folder)
    atomic_write(facts, json.dumps({"format": FORMAT, **data}, indent=2) + "\n")
    found = environment()
    found["determinism"] = determinism(circumstances(recipe, found, data.get("processes", 1)))
    atomic_write(folder / "environment.json", json.dumps(found, indent=2) + "\n")
    recipe.write_resolved(folder / "recipe.yaml")


def _facts(path: Path) -> dict[str, Any]:
    """What ``data.json`` says; nothing where it is not there."""
    if not path.exists():
        return {}
    otherwise = "restore the file, or, if the recipe's data are as they were, delete it"
    return read_facts(path, otherwise)


def _has_rounds(folder: Path) -> bool:
    return (folder / "rounds" / "start.json").exists()


def environment() -> dict[str, Any]:
    """Versions, device and commit: what a number depends on besides the recipe."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "devices": torch.cuda.device_count() if cuda else 0,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("prefopt", *PACKAGES)},
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout prefopt runs from, if it runs from one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    return found.stdout.strip() or None


class MetricsFile(TrainerCallback):
    """Appends every log line to ``metrics.jsonl``, behind those that a checkpoint knows of."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what was logged up to the checkpoint, whatever became of the file since."""
        if state.is_world_process_zero and (state.log_history or self.path.exists()):
            kept = [line for line in state.log_history if _is_before(line, state.global_step)]
            lines = [{"step": line["step"], **line} for line in kept]
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Writes one line; the totals at the end of training, which do not survive a resumption,
        are left to the summary.
        """
        if state.is_world_process_zero and "train_runtime" not in logs:
            append(self.path, json.dumps({"step": state.global_step, **logs}) + "\n")


def _is_before(line: Mapping[str, Any], step: int) -> bool:
    """Whether a run resumed at a step leaves the line as it is.

    What begins a round comes again, and so does an evaluation, which is made after a checkpoint.
    """
    if "train_runtime" in line:
        return False
    comes_again = "evaluation/win_rate" in line or ("round" in line and "loss" not in line)
    return line["step"] < step or (line["step"] == step > 0 and not comes_again)


class ProgressBar(TrainerCallback):
    """A rich progress bar over the optimiser's steps, with the last loss beside it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the bar on the main process."""
        if state.is_world_process_zero:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            note = TextColumn("{task.fields[note]}")
            console = Console(stderr=True)  # stdout is for results
            self.bar = Progress(*columns, TimeRemainingColumn(), note, console=console)
            self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, note=""
            )
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar on."""
        if self.bar is not None:
            # the last round of a run may have fewer steps than were planned for it
            self.bar.update(
                self.bar.task_ids[0], completed=state.global_step, total=state.max_steps
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Shows the loss."""
        if self.bar is not None and "loss" in logs:
            self.bar.update(self.bar.task_ids[0], note=f"loss {float(logs['loss']):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.stop()
