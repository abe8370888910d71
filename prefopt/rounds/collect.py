"""Sample and judge: the part of a round that comes before training, kept on disk as it grows.

Work is dealt to processes by shards of prompts, and a shard on disk is never computed again.
Neither shards nor samples depend on the number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState

from prefopt.data.rows import Prompt
from prefopt.data.tokenize import TokenizedPrompts
from prefopt.disk import check_space
from prefopt.preemption import Preempted, asked, leave_if_asked
from prefopt.rounds.judging import Judgement
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.sampling import Sampler, sample_shards
from prefopt.rounds.store import (
    RESTORE,
    Sample,
    json_lines,
    judgements_path,
    read_judgements,
    read_rollouts,
    rollouts_path,
    write_judgements,
    write_rollouts,
)
from prefopt.rounds.sums import DamagedError, write_summed

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
# (prompts, the texts of each prompt's samples, a name for each prompt) -> one judgement a prompt
Ask = Callable[[Sequence[Prompt], Sequence[Sequence[str]], Sequence[str]], list[Judgement]]


@dataclass(frozen=True)
class Collector:
    """What every round is collected with.

    Attributes:
        sampler: Who samples, and how.
        ask: What the judge is asked about the samples; None: there is nothing to judge.
        prompts_per_shard: Prompts in a file.
        seed: Of the run; every round, every redraw and every recurrence of a prompt in a round has
            noise of its own.
        judged_too: The texts of a row's offline answers that are judged behind its samples.
        past: Whether the policies that sample have moved since; then nothing can be drawn.
    """

    sampler: Sampler
    ask: Ask | None
    prompts_per_shard: int
    seed: int
    judged_too: Callable[[int], list[str]] | None = None
    past: bool = False

    @property
    def prompts(self) -> TokenizedPrompts:
        """The rows whose prompts are sampled for."""
        return self.sampler.prompts


@dataclass(frozen=True)
class CollectedSamples:
    """The samples of a round and what was said of them, by position in the round."""

    samples: dict[int, list[Sample]]
    judgements: dict[int, Judgement]


def collect_samples(
    collector: Collector,
    folder: Path,
    index: int,
    planned: PlannedRound,
    *,
    progress: Progress,
) -> dict[str, float]:
    """Brings a round to disk, going on from what is there; all processes call this.

    Args:
        collector: Engine, judge and settings.
        folder: The round's folder.
        index: Number of the round.
        planned: Its prompts.
        progress: ``progress(title, total)`` is a context that yields a function to be told of
            each advance.

    Returns:
        Seconds this process spent, ``time/generate`` and ``time/judge``.
    """
    seconds = {"time/generate": 0.0} | ({"time/judge": 0.0} if collector.ask else {})
    if samples_are_collected(folder):
        return seconds
    drawing = first_drawing(collector, folder, index, planned)
    draw(collector, drawing, progress, seconds)
    state = PartialState()
    if state.is_main_process:
        collected = read_drawing(collector, drawing)
        report = {"round": index, **sampling_report(collected)}
        if collector.sampler.resets is not None:
            report |= reset_report(collected)
        write_summed(folder / "round.json", json_lines([report]))
    state.wait_for_everyone()
    return seconds


def samples_are_collected(folder: Path) -> bool:
    """Whether a round of samples is on disk, with the report that is written last."""
    return (folder / "round.json").exists()


@dataclass(frozen=True)
class Drawing:
    """One drawing of samples for some positions of a round.

    Attributes:
        folder: The round's.
        index: Number of the round.
        number: How often its prompts were drawn for before.
        planned: The round's prompts.
        shards: The positions in each file.
    """

    folder: Path
    index: int
    number: int
    planned: PlannedRound
    shards: Sequence[Sequence[int]]


def drawing_of(
    collector: Collector,
    folder: Path,
    index: int,
    number: int,
    planned: PlannedRound,
    positions: Sequence[int],
) -> Drawing:
    """The drawing for some positions, in shards of ``prompts_per_shard``."""
    size = collector.prompts_per_shard
    shards = [positions[start : start + size] for start in range(0, len(positions), size)]
    return Drawing(folder, index, number, planned, shards)


def first_drawing(collector: Collector, folder: Path, index: int, planned: PlannedRound) -> Drawing:
    """The drawing for all prompts of a round."""
    return drawing_of(collector, folder, index, 0, planned, range(len(planned.prompts)))


def draw(
    collector: Collector, drawing: Drawing, progress: Progress, seconds: dict[str, float]
) -> None:
    """Samples and judges what is not on disk yet; all processes call this.

    Raises:
        PrefoptError: The disk is nearly full, or samples are missing that cannot be drawn again.
        Preempted: SIGTERM came; the shard that was being made then is on disk.
    """
    check_space(drawing.folder, 0, "a shard of samples")  # before it has been sampled
    stages = [("generate", rollouts_path, sample)]
    if collector.ask is not None:
        stages.append(("judge", judgements_path, judge))
    for name, path, work in stages:
        begun = time.perf_counter()
        missing, own = undone(drawing, path)
        if missing and work is sample and collector.past:
            raise DamagedError(
                f"{path(drawing.folder, drawing.number, missing[0])}: gone, and the policy that "
                "drew these samples has moved",
                RESTORE,
            )
        if missing:
            with (
                progress(name, sum(len(drawing.shards[shard]) for shard in own)) as advance,
                suppress(Preempted),  # what the others are at is waited for
            ):
                work(collector, drawing, own, partial(_after_shard, advance))
            PartialState().wait_for_everyone()
            leave_if_asked()
        seconds[f"time/{name}"] += time.perf_counter() - begun


def _after_shard(advance: Callable[[int], None], prompts: int) -> None:
    advance(prompts)
    if asked():
        raise Preempted


def undone(drawing: Drawing, path: Callable[[Path, int, int], Path]) -> tuple[list[int], list[int]]:
    """The shards whose file is not there, and which of them this process is to do."""
    state = PartialState()
    missing = [
        shard
        for shard in range(len(drawing.shards))
        if not path(drawing.folder, drawing.number, shard).exists()
    ]
    state.wait_for_everyone()  # all look before any writes, so that they deal the same shards
    return missing, missing[state.process_index :: state.num_processes]


def sample(
    collector: Collector, drawing: Drawing, own: Sequence[int], advance: Callable[[int], None]
) -> None:
    """Draws the samples of some shards."""

    def keep(shard: int, samples: dict[int, list[Sample]]) -> None:
        write_rollouts(rollouts_path(drawing.folder, drawing.number, shard), samples)
        advance(len(samples))

    seed = f"{collector.seed}/{drawing.index}/{drawing.number}"
    shards = {shard: drawing.shards[shard] for shard in own}
    sample_shards(collector.sampler, seed, drawing.planned, shards, keep)


def judge(
    collector: Collector, drawing: Drawing, own: Sequence[int], advance: Callable[[int], None]
) -> None:
    """Has the samples of some shards judged."""
    assert collector.ask is not None
    judged_too = collector.judged_too or (lambda row: [])
    planned = drawing.planned
    for shard in own:
        positions = drawing.shards[shard]
        samples = read_rollouts(rollouts_path(drawing.folder, drawing.number, shard))
        rows = [planned.prompts[position] for position in positions]
        judged = collector.ask(
            [collector.prompts.prompt[row] for row in rows],
            [texts_of(samples[p]) + judged_too(r) for p, r in zip(positions, rows, strict=True)],
            [prompt_key(collector, drawing.index, planned, position) for position in positions],
        )
        path = judgements_path(drawing.folder, drawing.number, shard)
        write_judgements(path, dict(zip(positions, judged, strict=True)))
        advance(len(rows))


def read_drawing(collector: Collector, drawing: Drawing) -> CollectedSamples:
    """What is on disk of a drawing.

    Raises:
        PrefoptError: A file is missing or cannot be read.
    """
    samples: dict[int, list[Sample]] = {}
    judgements: dict[int, Judgement] = {}
    for shard in range(len(drawing.shards)):
        samples |= read_rollouts(rollouts_path(drawing.folder, drawing.number, shard))
        if collector.ask is not None:
            path = judgements_path(drawing.folder, drawing.number, shard)
            judgements |= read_judgements(path)
    return CollectedSamples(samples, judgements)


def prompt_key(collector: Collector, index: int, planned: PlannedRound, position: int) -> str:
    """A name for a prompt of a round, which seeds the random choices made about it."""
    prompt, which = planned.prompts[position], planned.passes[position]
    return f"{collector.seed}/{index}/{which}/{prompt}"


def texts_of(samples: Sequence[Sample]) -> list[str]:
    """The texts of samples."""
    return [sample.completion.text for sample in samples]


def sampling_report(collected: CollectedSamples) -> dict[str, Any]:
    """Counts and means over samples."""
    drawn = [sample for group in collected.samples.values() for sample in group]
    scores = [
        score
        for position, judgement in collected.judgements.items()
        for score in judgement.scores[: len(collected.samples[position])]
    ]
    report: dict[str, Any] = {"prompts": len(collected.samples), "samples": len(drawn)}
    report["rollout/length"] = fmean(len(sample.completion.token_ids) for sample in drawn)
    report["rollout/finished"] = fmean(s.completion.finish_reason == "stop" for s in drawn)
    report["rollout/empty"] = fmean(not sample.completion.text.strip() for sample in drawn)
    if scores:
        report["judge/score"] = fmean(scores)
    if collected.judgements:
        report["judge/spread"] = _spread(collected)
    return report


def _spread(collected: CollectedSamples) -> float:
    """How far the judge told samples apart; 0 where it told none.

    The mean over prompts of the largest difference between the scores of a prompt's samples, or,
    with one sample a prompt, between those of the round; where samples were compared only, the
    mean of |2 P - 1|.
    """
    groups = [
        judgement.scores[: len(collected.samples[position])]
        for position, judgement in collected.judgements.items()
    ]
    if not any(groups):
        played = [p for judgement in collected.judgements.values() for _, _, p in judgement.matches]
        return fmean(abs(2 * p - 1) for p in played) if played else 0.0
    if max(map(len, groups)) == 1:
        groups = [list(chain.from_iterable(groups))]
    return fmean(max(scores) - min(scores) for scores in groups)


def reset_report(collected: CollectedSamples) -> dict[str, float]:
    """How many samples were reset, and how many tokens of a sample were forced."""
    forced = [sample.forced for group in collected.samples.values() for sample in group]
    return {"rollout/reset": fmean(n > 0 for n in forced), "rollout/forced": fmean(forced)}
