"""Files that are damaged between a kill and the next start: cut short, changed, zeroed, deleted."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

from run_folders import is_partial, phase

from faults.runs import Bench, differences, leftovers, random_moment, scaled
from faults.table import Event, Fault, counts, fault

KILLED = 4  # runs of each case
DAMAGES = 6  # to each of them, one after another, each to all as it was
SHARDS = 4  # of these to a shard of the newest round, where there is any
OWED = 20  # damaged shards of rounds in all, those that were not read again not counted
AGAIN, REFUSED, UNREAD = "made again or not needed", "refused, with the remedy", "not read again"

SHARDS_OF_ROUNDS = "shards of rounds (samples, judgements, log-probs)"
# what may be damaged, and the row that counts it; what is named first is what a file is
FILES = {
    "checkpoints/*/complete.json": "checkpoints",
    "checkpoints/*/*model.safetensors": "checkpoints",
    "checkpoints/*/optimizer.pt": "checkpoints",
    "checkpoints/*/scheduler.pt": "checkpoints",
    "checkpoints/*/rng_state.pth": "checkpoints",
    "checkpoints/*/trainer_state.json": "checkpoints",
    "checkpoints/*/kept/*/*": "checkpoints",
    "checkpoints/*/critic/*": "checkpoints",
    "rounds/0*/draw-*/rollouts-*": SHARDS_OF_ROUNDS,
    "rounds/0*/draw-*/judgements-*": SHARDS_OF_ROUNDS,
    "rounds/0*/log_probs/*/*": SHARDS_OF_ROUNDS,
    "rounds/start.json": "pairs, reports and initial weights of rounds",
    "rounds/initial/*": "pairs, reports and initial weights of rounds",
    "rounds/0*/pairs.jsonl": "pairs, reports and initial weights of rounds",
    "rounds/0*/round.json": "pairs, reports and initial weights of rounds",
    "log_probs/*/*": "log-probs of the reference, evaluations",
    "evaluations/*.json*": "log-probs of the reference, evaluations",
    "evaluations/0*/*.json*": "log-probs of the reference, evaluations",
    "evaluations/0*/log_probs/*/*": "log-probs of the reference, evaluations",
    "metrics.jsonl": "metrics, recipe, facts about data",
    "recipe.yaml": "metrics, recipe, facts about data",
    "data.json": "metrics, recipe, facts about data",
}


def jobs(bench: Bench, scale: float) -> list[Callable[[], list[Event]]]:
    """Every killed run that is damaged, each for a process of its own."""
    damages, times = scaled(DAMAGES, scale), scaled(KILLED, scale)
    return [
        partial(damaged_run, bench, case, n, damages) for case in bench.whole for n in range(times)
    ]


def rows(events: Sequence[Event]) -> list[Fault]:
    """A row for each part of a run folder."""
    found = []
    for kind in dict.fromkeys(FILES.values()):
        own = [event for event in events if event.kind == kind]
        if own:
            note = f"{counts(e.outcome for e in own)}; {counts(e.phase for e in own)}"
            found.append(fault(f"corrupt file: {kind}", own, note))
    return found


def wanting(events: Sequence[Event]) -> list[str]:
    """Says so where too few shards were damaged that are read, or nothing of another part was."""
    found = Counter(event.kind for event in events)
    read = [e for e in events if e.kind == SHARDS_OF_ROUNDS and e.outcome != UNREAD]
    few = [f"{len(read)} damaged shards, expected {OWED}"] if len(read) < OWED else []
    return few + [f"none of {kind}" for kind in dict.fromkeys(FILES.values()) if not found[kind]]


def damaged_run(bench: Bench, case: str, number: int, damages: int) -> list[Event]:
    """Kills a run, then damages one file of it at a time and starts it again."""
    chance = Random(f"{bench.seed} {case} corruption {number}")
    run = bench.folder / "damaged" / f"{case}-{number}"
    killed = run.with_name(f"{run.name}-killed")
    kill_late(bench, case, run, chance)
    run.rename(killed)
    found = []
    for n in range(damages):
        shutil.copytree(killed, run)
        found.append(damaged(bench, case, run, killed, chance, shard=n < SHARDS))
        if not found[-1].lost:
            shutil.rmtree(run)
        else:
            run.rename(run.with_name(f"{run.name}-lost-{len(found)}"))
    return found


def kill_late(bench: Bench, case: str, run: Path, chance: Random) -> None:
    """Kills a run at a random moment, once it has made something."""
    while True:
        moment = random_moment(chance, bench.whole[case], chance.choice(("time", "writes")))
        process = bench.start(case, run, moment.write)
        reached = process.reach(moment)
        process.kill()
        at = phase(run, process.began, bench.whole[case].run)
        if reached and at not in ("loading", "ending"):  # at its end little is read again
            return
        shutil.rmtree(run, ignore_errors=True)


def damaged(
    bench: Bench, case: str, run: Path, killed: Path, chance: Random, *, shard: bool
) -> Event:
    """Damages a random file of a run, and has it go on; what is refused is mended as it says.

    Args:
        bench: What faults are injected into.
        case: The run.
        run: Its folder.
        killed: A copy of it.
        chance: Chooses the file.
        shard: Whether it is one of the newest round, if there are any.
    """
    there = {p: [f for f in sorted(run.glob(p)) if not is_partial(f)] for p in FILES}
    *_, newest = sorted(run.glob("rounds/0*")) or [run]
    for pattern in [pattern for pattern in FILES if FILES[pattern] == SHARDS_OF_ROUNDS]:
        there[pattern] = [path for path in there[pattern] if path.is_relative_to(newest)]
    kinds = sorted({FILES[pattern] for pattern, files in there.items() if files})
    others = [kind for kind in kinds if kind != SHARDS_OF_ROUNDS] or kinds
    kind = SHARDS_OF_ROUNDS if shard and SHARDS_OF_ROUNDS in kinds else chance.choice(others)
    patterns = [pattern for pattern, files in there.items() if files and FILES[pattern] == kind]
    path = chance.choice(there[chance.choice(patterns)])
    how = damage(path, chance)
    name, after = str(path.relative_to(run)), path.read_bytes() if path.exists() else None
    ended = bench.finish(case, run)
    result, lost, refusal = AGAIN, [], ended.refusal()
    if refusal:
        result = REFUSED
        if not names(refusal, path, run):
            lost.append(f"the error does not name the file: {refusal}")
        if not re.search("restore|delete", refusal):
            lost.append(f"the error does not say what to do: {refusal}")
        remedy = mend(refusal, path, run, killed, chance)
        ended = bench.finish(case, run)
        if ended.code:
            lost.append(f"{refusal}: {remedy}, but then {ended}")
    if ended.code:
        lost = lost or [f"neither made again nor refused in one line: {ended}"]
        result = f"exit {ended.code}"
    else:
        different = differences(run, bench.whole[case].run) + leftovers(run)
        if result != REFUSED:
            unread = (path.read_bytes() if path.exists() else None) == after
            result = UNREAD if unread and different else AGAIN
            different = [text for text in different if not (unread and text.startswith(name))]
        lost += different
    lost = [f"{name} {how}: {text}" for text in lost]
    return Event(kind, case, how, result, refusal or "", tuple(lost))


def damage(path: Path, chance: Random) -> str:
    """Damages a file; says how."""
    content = bytearray(path.read_bytes())
    how = chance.choice(("cut short", "one bit flipped", "zeroed", "deleted"))
    if how == "deleted" or not content:
        path.unlink()
        return "deleted"
    at = chance.randrange(len(content))
    if how == "cut short":
        del content[at:]
    elif how == "one bit flipped":
        content[at] ^= 1 << chance.randrange(8)
    else:
        end = min(len(content), at + 4096)
        content[at:end] = bytes(end - at)
    path.write_bytes(content)
    return how


def names(refusal: str, path: Path, run: Path) -> bool:
    """Whether an error names a file, or a folder in the run that holds it."""
    folders = [folder for folder in path.parents if folder.is_relative_to(run) and folder != run]
    return any(re.search(rf"{re.escape(str(p))}(?![\w/.])", refusal) for p in (path, *folders))


def mend(refusal: str, path: Path, run: Path, killed: Path, chance: Random) -> str:
    """Does what an error says, one thing of two if it leaves the choice; says what."""
    _, deletes, rest = refusal.partition("delete ")
    restores = "restore" in refusal
    if not deletes or (restores and chance.random() < 0.5):
        shutil.copy2(killed / path.relative_to(run), path)
        return "restored"
    named = [Path(word) for word in re.findall(rf"{re.escape(str(run))}/[\w./-]*\w", rest)]
    round_of = [folder for folder in path.parents if folder.parent == run / "rounds"]
    if "the run folder" in rest or "the folder to begin" in rest:
        named = [run]
    elif "the checkpoints" in rest:
        named = [run / "checkpoints"]
    elif "the folder of its round" in rest:
        named = round_of
    elif not named:
        named = [path]
    if "the rounds after it" in rest:
        named += [folder for folder in run.glob("rounds/0*") if folder > max(named)]
    for place in named:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    return f"deleted {', '.join(str(place) for place in named)}"
