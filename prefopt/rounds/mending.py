"""Damaged files of a round: what can be made again is taken out of the way, so that it is.

Samples can be drawn again as long as the policy that drew them is the one at hand. Judgements and
pairs can be made again of their samples. What was made of a damaged file goes with it, since
on a GPU a sample may come out otherwise.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from prefopt.rounds.storage import remove_directory
from prefopt.rounds.store import RESTORE
from prefopt.rounds.sums import (
    DamagedError,
    damaged,
    expected_sum,
    set_aside,
    sum_of_file,
    sum_path,
    summed_files,
)

PAIRS, REPORT, SAMPLES = "pairs.jsonl", "round.json", "draw-*"


def clear_damaged(folder: Path, *, past: bool = False) -> None:
    """Takes what is damaged of a round that begins, and what depends on it, out of the way.

    One process calls this. Were it killed meanwhile, the next one would find the same damage.

    Args:
        folder: The round's.
        past: Whether the policy that samples has moved since.

    Raises:
        DamagedError: Samples of a past policy are damaged.
    """
    for drawing in _drawings(folder):
        rollouts = damaged(sorted(drawing.glob("rollouts-*.parquet")))
        for damage in rollouts.values() if past else ():
            raise _lost(damage)
        judgements = damaged(sorted(drawing.glob("judgements-*.jsonl")))
        gone = [] if past else [path for path in summed_files(drawing) if not path.exists()]
        if not rollouts and not judgements and not gone:
            continue
        _remove(folder / REPORT)  # the round is not complete from here on
        _remove(folder / PAIRS)
        shutil.rmtree(folder / "log_probs", ignore_errors=True)
        for later in _drawings(folder):
            if _number(later) > _number(drawing):
                remove_directory(later)
        set_aside(judgements)
        for path in (*rollouts, *gone):
            _remove(path.with_name(path.stem.replace("rollouts", "judgements") + ".jsonl"))
        set_aside(rollouts)
        return
    results = damaged((folder / PAIRS, folder / REPORT))
    if results:
        set_aside(results)
        _remove(folder / REPORT)
        _remove(folder / PAIRS)


def clear_damaged_results(folder: Path, names: Collection[str]) -> dict[Path, str]:
    """Takes what is damaged of a round out of the way whose policy is past.

    One process calls this.

    Args:
        folder: The round's.
        names: What is read of it again: ``PAIRS``, ``REPORT``, ``SAMPLES``. Samples and judgements
            are looked at as well where something has to be made of them.

    Returns:
        The files that are to be made again, and what their sums are to be.

    Raises:
        DamagedError: Samples are damaged, which cannot be made again.
    """
    results = (folder / PAIRS, folder / REPORT)
    bad = damaged(path for path in results if path.name in names)
    again = {*bad, *filter(_is_gone, results)}
    if not again and SAMPLES not in names:
        return {}
    for drawing in _drawings(folder):
        bad |= damaged(sorted(drawing.glob("judgements-*.jsonl")))
        lost = damaged(sorted(drawing.glob("rollouts-*.parquet")))
        for path in summed_files(drawing):
            if path.name.startswith("judgements-") and (path in bad or _is_gone(path)):
                again.add(path)
            elif path.name.startswith("rollouts-") and _is_gone(path):
                lost[path] = f"{path}: gone"
        for damage in lost.values():
            raise _lost(damage)
    if not again:
        return {}
    again |= {path for path in results if expected_sum(path) is not None}
    expected = {path: expected_sum(path) or "" for path in again}
    set_aside(bad)
    for path in results:  # their sums stay, to compare with
        path.unlink(missing_ok=True)
    return expected


def check_made_again(expected: Mapping[Path, str]) -> None:
    """Compares files that were made again with what they were.

    Args:
        expected: What `clear_damaged_results` has returned.

    Raises:
        DamagedError: They are others, and what was trained on is lost.
    """
    for path, wanted in expected.items():
        if (found := sum_of_file(path)) != wanted:
            raise DamagedError(
                f"{path}: was damaged, and is not the same now that it was made again: found the "
                f"XXH3 sum {found}, expected {wanted}",
                RESTORE,
            )


def _lost(damage: str) -> DamagedError:
    return DamagedError(f"{damage}; the policy that drew these samples has moved", RESTORE)


def _drawings(folder: Path) -> list[Path]:
    return sorted(folder.glob(SAMPLES), key=_number)


def _number(drawing: Path) -> int:
    return int(drawing.name.removeprefix("draw-"))


def _is_gone(path: Path) -> bool:
    """Whether a file was complete once; without a sum nothing says so."""
    return not path.exists() and expected_sum(path) is not None


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    sum_path(path).unlink(missing_ok=True)
