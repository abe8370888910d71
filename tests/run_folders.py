"""What tests and injected faults ask of a run folder: what is there, and what a run was at."""

from __future__ import annotations

from pathlib import Path

from prefopt.trainers.checkpoints import (
    COMPLETE_MARKER,
    complete_checkpoints,
    last_complete_checkpoint,
)

# in the order a run comes by them, most of them again in every round
PHASES = (
    "loading",
    "generating",
    "judging",
    "pairing",
    "log-probs",
    "training",
    "checkpointing",
    "evaluating",
    "ending",
)
Stamp = tuple[int, int]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_partial(path: Path | str) -> bool:
    """Whether a path is of something half-written."""
    return ".partial" in str(path)


def complete(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but half-written ones, and damaged ones that were set aside."""
    return {
        name: data
        for name, data in contents(folder).items()
        if not is_partial(name) and not name.endswith(".corrupt")
    }


def modified(path: Path) -> int:
    """When a file was last written, in ns."""
    return path.stat().st_mtime_ns


def stamps(run: Path) -> dict[str, Stamp]:
    """When each file that is written once was written, and where it lies."""
    return {
        str(path.relative_to(run)): (modified(path), path.stat().st_ino)
        for path in written_once(run)
    }


def written_once(run: Path) -> list[Path]:
    """What is made of rounds, initial weights, log-probs and evaluations; whole files."""
    found = (
        *run.glob("rounds/0*/**/*.*"),
        *run.glob("rounds/initial/*"),
        *run.glob("log_probs/**/*.*"),
        *run.glob("evaluations/**/*.*"),
    )
    # the sum of a file, whose name begins with a dot, is there before the file is
    whole = (path for path in found if path.is_file() and not is_partial(path))
    return [path for path in whole if not path.name.startswith(".")]


def checkpoint_stamps(run: Path) -> dict[Path, Stamp]:
    """When each complete checkpoint was written, and where it lies."""
    markers = {path: path / COMPLETE_MARKER for path in complete_checkpoints(run / "checkpoints")}
    return {path: (modified(m), m.stat().st_ino) for path, m in markers.items()}


def beside_the_policy(run: Path) -> dict[str, bytes]:
    """What the last checkpoint holds of critic, target and half step."""
    last = last_complete_checkpoint(run / "checkpoints")
    assert last is not None, f"{run}: no complete checkpoint"
    found = contents(last)
    return {name: found[name] for name in found if name.startswith(("kept/", "critic/"))}


def phase(run: Path, began: int, whole: Path) -> str:
    """What a run was at when it was killed, one of ``PHASES``, as told by what it left.

    Args:
        run: Its folder.
        began: When its process began, in ns since the epoch.
        whole: The folder of the same run, uninterrupted.
    """
    written = [path for path in run.rglob("*") if path.is_file() and modified(path) > began]
    places = {path.relative_to(run).parts[0] for path in written}
    if any(name.startswith(("final", ".final", "adapter")) for name in places):
        return "ending"
    if any(_in_half_a_checkpoint(path, run / "checkpoints") for path in written):
        return "checkpointing"
    if not places & {"rounds", "log_probs", "checkpoints", "metrics.jsonl", "evaluations"}:
        return "loading"
    missing = _missing(run, whole)
    for name, stage in (
        ("rollouts-", "generating"),
        ("judgements-", "judging"),
        ("round.json", "pairing"),
        ("log_probs", "log-probs"),
    ):
        if any(name in path for path in missing):
            return stage
    *_, evaluated = sorted(run.glob("evaluations/0*")) or [None]
    if (evaluated and not (evaluated / "result.json").exists()) or _only_begun(run):
        return "evaluating"
    return "ending" if _steps(run) == _steps(whole) else "training"


def _steps(run: Path) -> tuple[int, str | None]:
    """Steps that are logged, and the last checkpoint."""
    metrics, last = run / "metrics.jsonl", last_complete_checkpoint(run / "checkpoints")
    logged = metrics.read_text().count('"loss"') if metrics.exists() else 0
    return logged, last and last.name


def _in_half_a_checkpoint(path: Path, checkpoints: Path) -> bool:
    if not path.is_relative_to(checkpoints):
        return False
    folder = checkpoints / path.relative_to(checkpoints).parts[0]
    return is_partial(path) or not (folder / "complete.json").exists()


def _missing(run: Path, whole: Path) -> list[str]:
    """What the newest round, or a run without rounds, has not yet brought to disk."""
    first = run / ("rounds/0000" if (whole / "rounds").exists() else "log_probs")
    *_, last = sorted(run.glob("rounds/0*")) or [first]
    there = whole / last.relative_to(run)
    return sorted(complete(there).keys() - complete(last).keys()) if there.exists() else []


def _only_begun(run: Path) -> bool:
    """Whether the policy as it starts is being asked for what it will be compared with."""
    return (run / "evaluations").exists() and not (run / "evaluations" / "baseline.jsonl").exists()
