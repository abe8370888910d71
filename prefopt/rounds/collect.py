"""Sample and judge: the part of a round that comes before training, kept on disk as it grows.

Work is dealt to processes by shards of prompts, and a shard on disk is never computed again.
Neither shards nor samples depend on the number of processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState

from prefopt.data.rows import Prompt
from prefopt.data.tokenize import TokenizedPrompts, occurrences
from prefopt.rollout.engine import Engine, SamplingSettings
from prefopt.rounds.judging import Judgement
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.resets import Resets
from prefopt.rounds.store import (
    Sample,
    judgements_path,
    read_judgements,
    read_rollouts,
    rollouts_path,
    write_judgements,
    write_lines,
    write_rollouts,
)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
# (prompts, the texts of each prompt's samples, a name for each prompt) -> one judgement a prompt
Ask = Callable[[Sequence[Prompt], Sequence[Sequence[str]], Sequence[str]], list[Judgement]]


@dataclass(frozen=True)
class Collector:
    """What every round is collected with.

    Attributes:
        prompts: The rows whose prompts are sampled for.
        engine: Samples from the policy as it is at that moment.
        ask: What the judge is asked about the samples; None: there is nothing to judge.
        sampling: The settings of each part of a prompt's samples; their ``samples_per_prompt`` add
            up, ``seed`` and ``first_sample`` are set here.
        prompts_per_shard: Prompts in a file.
        seed: Of the run; every round, every redraw and every recurrence of a prompt in a round has
            noise of its own.
        opponent: Draws as many samples again, which come after the policy's.
        resets: Begins samples with a part of an offline answer.
        judged_too: The texts of a row's offline answers that are judged behind its samples.
    """

    prompts: TokenizedPrompts
    engine: Engine
    ask: Ask | None
    sampling: Sequence[SamplingSettings]
    prompts_per_shard: int
    seed: int
    opponent: Engine | None = None
    resets: Resets | None = None
    judged_too: Callable[[int], list[str]] | None = None


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
    positions = range(len(planned.prompts))
    draw(collector, folder, index, 0, planned, positions, progress, seconds)
    state = PartialState()
    if state.is_main_process:
        collected = read_samples(collector, folder, planned)
        report = {"round": index, **sampling_report(collected)}
        if collector.resets is not None:
            report |= reset_report(collected)
        write_lines(folder / "round.json", [report])
    state.wait_for_everyone()
    return seconds


def samples_are_collected(folder: Path) -> bool:
    """Whether a round of samples is on disk, with the report that is written last."""
    return (folder / "round.json").exists()


def read_samples(collector: Collector, folder: Path, planned: PlannedRound) -> CollectedSamples:
    """What is on disk of a round's first draw.

    Args:
        collector: What the round was collected with.
        folder: The round's folder.
        planned: Its prompts.

    Raises:
        PrefoptError: A file is missing or cannot be read.
    """
    shards = math.ceil(len(planned.prompts) / collector.prompts_per_shard)
    samples: dict[int, list[Sample]] = {}
    judgements: dict[int, Judgement] = {}
    for shard in range(shards):
        samples |= read_rollouts(rollouts_path(folder, 0, shard))
        if collector.ask is not None:
            judgements |= read_judgements(judgements_path(folder, 0, shard))
    return CollectedSamples(samples, judgements)


def draw(
    collector: Collector,
    folder: Path,
    index: int,
    number: int,
    planned: PlannedRound,
    positions: Sequence[int],
    progress: Progress,
    seconds: dict[str, float],
) -> int:
    """Samples and judges some positions of a round; returns the number of shards they make."""
    state = PartialState()
    size = collector.prompts_per_shard
    shards = [positions[start : start + size] for start in range(0, len(positions), size)]
    # equal prompts of a round differ in this: an engine gives them equal samples
    again = occurrences(collector.prompts.prompt_ids[row] for row in planned.prompts)

    def sample(shard: int) -> None:
        seed = f"{collector.seed}/{index}/{number}"
        samples = _sample(collector, seed, planned, shards[shard], again)
        write_rollouts(rollouts_path(folder, number, shard), samples)

    def judge(shard: int, ask: Ask) -> None:
        samples = read_rollouts(rollouts_path(folder, number, shard))
        rows = [planned.prompts[p] for p in shards[shard]]
        judged_too = collector.judged_too or (lambda row: [])
        judged = ask(
            [collector.prompts.prompt[row] for row in rows],
            [
                texts_of(samples[p]) + judged_too(row)
                for p, row in zip(shards[shard], rows, strict=True)
            ],
            [prompt_key(collector, index, planned, position) for position in shards[shard]],
        )
        path = judgements_path(folder, number, shard)
        write_judgements(path, dict(zip(shards[shard], judged, strict=True)))

    stages: list[tuple[str, Callable[..., Path], Callable[[int], None]]]
    stages = [("generate", rollouts_path, sample)]
    if collector.ask is not None:
        stages.append(("judge", judgements_path, partial(judge, ask=collector.ask)))
    for name, path, work in stages:
        begun = time.perf_counter()
        # all processes look before any writes, so that they deal the same shards
        missing = [s for s in range(len(shards)) if not path(folder, number, s).exists()]
        state.wait_for_everyone()
        own = missing[state.process_index :: state.num_processes]
        with progress(name, sum(len(shards[shard]) for shard in own)) as advance:
            for shard in own:
                work(shard)
                advance(len(shards[shard]))
        state.wait_for_everyone()
        seconds[f"time/{name}"] += time.perf_counter() - begun
    return len(shards)


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
    if scores:
        report["judge/score"] = fmean(scores)
    return report


def reset_report(collected: CollectedSamples) -> dict[str, float]:
    """How many samples were reset, and how many tokens of a sample were forced."""
    forced = [sample.forced for group in collected.samples.values() for sample in group]
    return {"rollout/reset": fmean(n > 0 for n in forced), "rollout/forced": fmean(forced)}


def _sample(
    collector: Collector,
    seed: str,
    planned: PlannedRound,
    positions: Sequence[int],
    again: Sequence[int],
) -> dict[int, list[Sample]]:
    """Draws all samples of some positions, the parts of the mix one after another."""
    samples: dict[int, list[Sample]] = {position: [] for position in positions}
    players = [(collector.engine, part) for part in collector.sampling]
    if collector.opponent is not None:
        players += [(collector.opponent, part) for part in collector.sampling]
    for which in sorted({again[position] for position in positions}):
        chosen = [p for p in positions if again[p] == which]
        rows = [planned.prompts[p] for p in chosen]
        first = 0
        for engine, part in players:
            settings = replace(part, seed=_seed(f"{seed}/{which}"), first_sample=first)
            first += part.samples_per_prompt
            drawn = _draw_rows(collector, engine, rows, settings)
            for position, group in zip(chosen, drawn, strict=True):
                samples[position] += group
    return samples


def _draw_rows(
    collector: Collector, engine: Engine, rows: Sequence[int], settings: SamplingSettings
) -> list[list[Sample]]:
    prompts = [collector.prompts.prompt_ids[row] for row in rows]
    if collector.resets is not None:
        return collector.resets.draw(engine, rows, prompts, settings)
    answers = engine.generate(prompts, settings)
    return [[Sample(answer, settings.temperature) for answer in group] for group in answers]


def _seed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")
