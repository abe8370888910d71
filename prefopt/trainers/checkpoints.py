"""Checkpoints on disk: written aside, summed, flushed, renamed; damaged ones are passed over.

checkpoints/
    .partial/checkpoint-8/    one that is being written
    checkpoint-4/             a complete one: transformers' files, what an algorithm adds, and
        complete.json         its step, seconds of training, format, and of every other file
                              the size in bytes and the XXH3 sum of 128 bits
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt.models.gathered import is_partitioned
from prefopt.rounds.facts import FORMAT, check_format
from prefopt.rounds.storage import atomic_write, put_in_place, remove_directory
from prefopt.rounds.sums import sum_of_file

logger = logging.getLogger(__name__)

COMPLETE_MARKER = "complete.json"
ASIDE = ".partial"


def finish_checkpoint(partial: Path, final: Path, seconds: float) -> None:
    """Makes a checkpoint of a folder that all its files were written to.

    Args:
        partial: The folder, aside.
        final: Its name to be; a checkpoint that has it is replaced.
        seconds: How long training took to here.
    """
    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "xxh128": sum_of_file(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    facts = {"format": FORMAT, "step": step_of(final), "seconds": seconds, "files": files}
    atomic_write(partial / COMPLETE_MARKER, json.dumps(facts, indent=1) + "\n")
    put_in_place(partial, final)


def remove_leftovers(output_dir: Path) -> None:
    """Frees the disk of what killed processes left half-written or half-deleted."""
    for path in (output_dir / ASIDE, *output_dir.glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial-*")):
        shutil.rmtree(path, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, step: int, best: str | None) -> None:
    """Deletes the checkpoints that a new one makes superfluous.

    Incomplete ones go first, and those of later steps: the run went on from before them.

    Args:
        output_dir: Where they are.
        limit: How many are kept; None: all.
        step: That of the newest, which stays.
        best: One that stays as well, if there is any.
    """
    if not limit:
        return

    def worth(path: Path) -> tuple[bool, int]:
        return step_of(path) <= step and problem_of(path, sums=False) is None, step_of(path)

    found = sorted(_folders(output_dir), key=worth)
    stay = {output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"} | ({Path(best)} if best else set())
    superfluous = len(found) - max(limit, len(stay))
    for path in [path for path in found if path not in stay][: max(superfluous, 0)]:
        remove_directory(path)


def last_complete_checkpoint(output_dir: Path, *, sums: bool = False) -> Path | None:
    """The newest checkpoint that was written to its end; others are passed over.

    Args:
        output_dir: Where checkpoints are.
        sums: Compares the content of every file with its sum and not the sizes only, and warns of
            what is passed over; for the one time that a run goes on from it.

    Raises:
        PrefoptError: A newer version of prefopt has written it.
    """
    for path in sorted(_folders(output_dir), key=step_of, reverse=True):
        problem = problem_of(path, sums=sums)
        if problem is None:
            return path
        if sums:
            logger.warning("%s; this checkpoint is passed over", problem)
    return None


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints whose files are there with their sizes, by step."""
    found = (path for path in _folders(output_dir) if problem_of(path, sums=False) is None)
    return sorted(found, key=step_of)


def way_back(output_dir: Path, step: int, rounds: Path) -> str:
    """What to do where a round is damaged that cannot be made again, in words.

    Args:
        output_dir: Where checkpoints are.
        step: The round's first, from 0.
        rounds: The round's folder.
    """
    older = [path for path in complete_checkpoints(output_dir) if step_of(path) <= step]
    newer = sorted((path for path in _folders(output_dir) if step_of(path) > step), key=step_of)
    goes_on = f"from {older[-1]}" if older else "from the beginning"
    return (
        f"restore the file, or delete {', '.join(map(str, [*newer, rounds]))} and the rounds after "
        f"it: the same command then goes on {goes_on}"
    )


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def seconds_until(checkpoint: Path | None) -> float:
    """How long training took to a checkpoint, in all processes that led there; 0 without one."""
    if checkpoint is None:
        return 0.0
    return float(_facts(checkpoint).get("seconds", 0.0))


def size_of_next(trainer: Any) -> int:
    """Bytes that the next checkpoint takes: those of the last, or its weights' and optimiser's."""
    last = last_complete_checkpoint(Path(trainer.args.output_dir))
    if last is not None:
        return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    adapter = hasattr(model, "peft_config")
    own = {id(p): p for p in model.parameters() if p.requires_grad or not adapter}
    groups = [] if trainer.optimizer is None else trainer.optimizer.param_groups
    every = own | {id(p): p for group in groups for p in group["params"]}
    trained = sum(_count(p) for p in every.values() if p.requires_grad)
    return weights_size(every.values()) + 8 * trained  # Adam's moments are in float32


def weights_size(parameters: Iterable[Any]) -> int:
    """Bytes that weights take on disk, whole, however they are sharded in memory."""
    return sum(_count(p) * p.element_size() for p in parameters)


def _count(parameter: Any) -> int:
    return int(parameter.ds_numel if is_partitioned(parameter) else parameter.numel())


def _folders(output_dir: Path) -> Iterator[Path]:
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    return (path for path in output_dir.glob("*") if pattern.fullmatch(path.name))


def _facts(checkpoint: Path) -> dict[str, Any]:
    facts = json.loads((checkpoint / COMPLETE_MARKER).read_text())
    if not isinstance(facts, dict):
        raise ValueError(f"found {facts!r:.40}, expected an object")
    return facts


def problem_of(checkpoint: Path, *, sums: bool) -> str | None:
    """Why a checkpoint is none to go on from; None if it is one."""
    marker = checkpoint / COMPLETE_MARKER
    try:
        facts = _facts(checkpoint)
    except FileNotFoundError:
        return f"{checkpoint}: written in part, there is no {COMPLETE_MARKER}"
    except (ValueError, OSError) as error:
        return f"{marker}: cannot be read ({error})"
    check_format(marker, facts)
    try:
        # versions without a format wrote no sums
        files = facts["files"] if "format" in facts else facts.get("files", {})
        known = [(checkpoint / name, fact["bytes"], fact["xxh128"]) for name, fact in files.items()]
    except (KeyError, TypeError, AttributeError) as error:
        return f"{marker}: damaged, found no sizes and sums ({error!r})"
    for path, expected_size, expected in known:
        if not path.is_file():
            return f"{path}: missing"
        if (size := path.stat().st_size) != expected_size:
            return f"{path}: found {size} bytes, expected {expected_size}"
        if sums and (found := sum_of_file(path)) != expected:
            return f"{path}: found the XXH3 sum {found}, expected {expected}"
    return None
