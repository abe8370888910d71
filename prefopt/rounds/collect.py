"""Collect, judge, pair: the part of a round that comes before training, kept on disk as it grows.

Work is dealt to processes by shards of prompts, and a shard on disk is never computed again.
Neither shards nor samples depend on the number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState

from prefopt.data.tokenize import TokenizedPrompts
from prefopt.data.tree import PromptTree
from prefopt.judge import Judge
from prefopt.rollout.engine import Engine, SamplingSettings
from prefopt.rounds.pairing import (
    Judgement,
    PairingSettings,
    PromptPairs,
    count_pairs,
    judge_samples,
    make_pairs,
)
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.store import (
    Sample,
    judgements_path,
    read_judgements,
    read_lines,
    read_rollouts,
    rollouts_path,
    write_judgements,
    write_lines,
    write_rollouts,
)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Collector:
    """What every round is collected with.

    Attributes:
        prompts: The prompt set.
        engine: Samples from the policy as it is at that moment.
        judge: Judges the samples.
        sampling: The settings of each part of a prompt's samples; their ``samples_per_prompt`` add
            up, ``seed`` and ``first_sample`` are set here.
        pairing: How samples become pairs.
        redraws: With ``ties="resample"``, how often new samples are drawn for a prompt at most.
        prompts_per_shard: Prompts in a file.
        seed: Of the run; every round, redraw and pass over the prompts has noise of its own.
    """

    prompts: TokenizedPrompts
    engine: Engine
    judge: Judge
    sampling: Sequence[SamplingSettings]
    pairing: PairingSettings
    redraws: int
    prompts_per_shard: int
    seed: int


@dataclass(frozen=True)
class CollectedRound:
    """The pairs of a round.

    Attributes:
        trees: One tree of (chosen, rejected) a pair.
        p_chosen: The pairs' labels.
    """

    trees: list[PromptTree]
    p_chosen: list[float]


def collect_round(
    collector: Collector,
    folder: Path,
    index: int,
    planned: PlannedRound,
    *,
    progress: Progress,
) -> dict[str, float]:
    """Brings a round's pairs to disk, going on from what is there; all processes call this.

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
    seconds = {"time/generate": 0.0, "time/judge": 0.0}
    if is_collected(folder):
        return seconds
    rollouts: dict[int, list[Sample]] = {}
    judgements: dict[int, Judgement] = {}
    made: dict[int, PromptPairs] = {}
    positions = list(range(len(planned.prompts)))
    redrawn = 0
    for draw in range(1 + (collector.redraws if collector.pairing.ties == "resample" else 0)):
        redrawn += len(positions) if draw else 0
        shards = _draw(collector, folder, index, draw, planned, positions, progress, seconds)
        for shard in range(shards):
            rollouts |= read_rollouts(rollouts_path(folder, draw, shard))
            judgements |= read_judgements(judgements_path(folder, draw, shard))
        for position in positions:
            texts = _texts(rollouts[position])
            key = _key(collector, index, planned, position)
            made[position] = make_pairs(judgements[position], texts, collector.pairing, key)
        positions = [position for position in positions if made[position].tied]
        if not positions:
            break
    state = PartialState()
    if state.is_main_process:
        _write_pairs(folder / "pairs.jsonl", collector.prompts, planned, rollouts, made)
        report = {"round": index, **_report(rollouts, judgements, made), "redrawn": redrawn}
        write_lines(folder / "round.json", [report])
    state.wait_for_everyone()
    return seconds


def is_collected(folder: Path) -> bool:
    """Whether a round's pairs are on disk, with the report that is written last."""
    return (folder / "round.json").exists() and (folder / "pairs.jsonl").exists()


def _draw(
    collector: Collector,
    folder: Path,
    index: int,
    draw: int,
    planned: PlannedRound,
    positions: Sequence[int],
    progress: Progress,
    seconds: dict[str, float],
) -> int:
    """Samples and judges some positions of a round; returns the number of shards they make."""
    state = PartialState()
    size = collector.prompts_per_shard
    shards = [positions[start : start + size] for start in range(0, len(positions), size)]

    def sample(shard: int) -> None:
        seed = f"{collector.seed}/{index}/{draw}"
        samples = _sample(collector, seed, planned, shards[shard])
        write_rollouts(rollouts_path(folder, draw, shard), samples)

    def judge(shard: int) -> None:
        samples = read_rollouts(rollouts_path(folder, draw, shard))
        texts = [_texts(samples[position]) for position in shards[shard]]
        prompts = [collector.prompts.prompt[planned.prompts[p]] for p in shards[shard]]
        keys = [_key(collector, index, planned, position) for position in shards[shard]]
        judged = judge_samples(collector.judge, prompts, texts, collector.pairing, keys)
        path = judgements_path(folder, draw, shard)
        write_judgements(path, dict(zip(shards[shard], judged, strict=True)))

    for name, path, work in (
        ("generate", rollouts_path, sample),
        ("judge", judgements_path, judge),
    ):
        begun = time.perf_counter()
        # all processes look before any writes, so that they deal the same shards
        missing = [s for s in range(len(shards)) if not path(folder, draw, s).exists()]
        state.wait_for_everyone()
        own = missing[state.process_index :: state.num_processes]
        with progress(name, sum(len(shards[shard]) for shard in own)) as advance:
            for shard in own:
                work(shard)
                advance(len(shards[shard]))
        state.wait_for_everyone()
        seconds[f"time/{name}"] += time.perf_counter() - begun
    return len(shards)


def read_round(folder: Path, planned: PlannedRound, prompts: TokenizedPrompts) -> CollectedRound:
    """The pairs of a round that was collected to its end.

    Raises:
        PrefoptError: A file is missing or cannot be read.
    """
    rows = read_lines(folder / "pairs.jsonl")
    trees = [
        PromptTree(
            prompts.prompt_ids[planned.prompts[row["position"]]],
            (row["chosen_ids"], row["rejected_ids"]),
        )
        for row in rows
    ]
    return CollectedRound(trees, [row["p_chosen"] for row in rows])


def sampled_trees(
    collector: Collector, folder: Path, planned: PlannedRound, *, limit: int
) -> list[PromptTree]:
    """One draw from the policy for each of the first prompts of a collected round.

    Only a plain sample (temperature 1, nothing cut off) is such a draw: the list is empty where no
    part of the mix is plain.
    """
    plain = [
        (part.temperature, part.top_p, part.top_k) == (1, 1, 0)
        for part in collector.sampling
        for _ in range(part.samples_per_prompt)
    ]
    if True not in plain:
        return []
    positions = range(min(limit, len(planned.prompts)))
    samples: dict[int, list[Sample]] = {}
    for shard in range(-(-len(positions) // collector.prompts_per_shard)):
        samples |= read_rollouts(rollouts_path(folder, 0, shard))
    return [
        PromptTree(
            collector.prompts.prompt_ids[planned.prompts[position]],
            [samples[position][plain.index(True)].completion.token_ids],
        )
        for position in positions
    ]


def _key(collector: Collector, index: int, planned: PlannedRound, position: int) -> str:
    """What seeds the random choices of a prompt's pairing."""
    prompt, which = planned.prompts[position], planned.passes[position]
    return f"{collector.seed}/{index}/{which}/{prompt}"


def _sample(
    collector: Collector, seed: str, planned: PlannedRound, positions: Sequence[int]
) -> dict[int, list[Sample]]:
    """Draws all samples of some positions, the parts of the mix one after another."""
    samples: dict[int, list[Sample]] = {position: [] for position in positions}
    for which in sorted({planned.passes[position] for position in positions}):
        chosen = [p for p in positions if planned.passes[p] == which]
        ids = [collector.prompts.prompt_ids[planned.prompts[p]] for p in chosen]
        first = 0
        for part in collector.sampling:
            settings = replace(part, seed=_seed(f"{seed}/{which}"), first_sample=first)
            first += part.samples_per_prompt
            answers = collector.engine.generate(ids, settings)
            for position, group in zip(chosen, answers, strict=True):
                samples[position] += [Sample(answer, part.temperature) for answer in group]
    return samples


def _seed(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [sample.completion.text for sample in samples]


def _write_pairs(
    path: Path,
    prompts: TokenizedPrompts,
    planned: PlannedRound,
    rollouts: Mapping[int, Sequence[Sample]],
    made: Mapping[int, PromptPairs],
) -> None:
    """Writes the pairs as rows that can be trained on again (``docs/data.md``), with their ids."""
    rows = []
    for position, result in sorted(made.items()):
        answers = [sample.completion for sample in rollouts[position]]
        for pair in result.pairs:
            chosen, rejected = answers[pair.chosen], answers[pair.rejected]
            rows.append(
                {
                    "prompt": prompts.prompt[planned.prompts[position]],
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "p_chosen": pair.p_chosen,
                    "position": position,
                    "chosen_sample": pair.chosen,
                    "rejected_sample": pair.rejected,
                    "chosen_ids": chosen.token_ids,
                    "rejected_ids": rejected.token_ids,
                }
            )
    write_lines(path, rows)


def _report(
    rollouts: Mapping[int, Sequence[Sample]],
    judgements: Mapping[int, Judgement],
    made: Mapping[int, PromptPairs],
) -> dict[str, Any]:
    """Counts and means over the samples that pairs were made of."""
    answers = [sample.completion for group in rollouts.values() for sample in group]
    scores = [score for judgement in judgements.values() for score in judgement.scores]
    report: dict[str, Any] = {"prompts": len(rollouts), "samples": len(answers)}
    report |= asdict(count_pairs(made.values()))
    report["rollout/length"] = fmean(len(answer.token_ids) for answer in answers)
    report["rollout/finished"] = fmean(answer.finish_reason == "stop" for answer in answers)
    if scores:
        report["judge/score"] = fmean(scores)
    return report
