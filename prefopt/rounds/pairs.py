"""A round of pairs on disk: its samples are judged, and pairs are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState

from prefopt.data.tokenize import TokenizedPrompts
from prefopt.data.tree import PromptTree
from prefopt.rounds.collect import (
    CollectedSamples,
    Collector,
    Progress,
    draw,
    drawing_of,
    prompt_key,
    read_drawing,
    sampling_report,
    texts_of,
)
from prefopt.rounds.judging import Judgement
from prefopt.rounds.pairing import PairingSettings, PromptPairs, count_pairs, make_pairs
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.store import (
    Sample,
    json_lines,
    read_lines,
    read_rollouts,
    rollouts_path,
)
from prefopt.rounds.sums import write_summed


@dataclass(frozen=True)
class CollectedPairs:
    """The pairs of a round.

    Attributes:
        trees: One tree of (chosen, rejected) a pair.
        p_chosen: The pairs' labels.
    """

    trees: list[PromptTree]
    p_chosen: list[float]


def collect_pairs(
    collector: Collector,
    folder: Path,
    index: int,
    planned: PlannedRound,
    pairing: PairingSettings,
    *,
    redraws: int,
    progress: Progress,
) -> dict[str, float]:
    """Brings a round's pairs to disk, going on from what is there; all processes call this.

    Args:
        collector: Engine, judge and settings.
        folder: The round's folder.
        index: Number of the round.
        planned: Its prompts.
        pairing: How samples become pairs.
        redraws: With ``ties="resample"``, how often new samples are drawn for a prompt at most.
        progress: As for :func:`prefopt.rounds.collect.collect_samples`.

    Returns:
        Seconds this process spent, ``time/generate`` and ``time/judge``.
    """
    seconds = {"time/generate": 0.0, "time/judge": 0.0}
    if pairs_are_collected(folder):
        return seconds
    rollouts: dict[int, list[Sample]] = {}
    judgements: dict[int, Judgement] = {}
    made: dict[int, PromptPairs] = {}
    positions = list(range(len(planned.prompts)))
    redrawn = 0
    for number in range(1 + (redraws if pairing.ties == "resample" else 0)):
        redrawn += len(positions) if number else 0
        drawing = drawing_of(collector, folder, index, number, planned, positions)
        draw(collector, drawing, progress, seconds)
        drawn = read_drawing(collector, drawing)
        rollouts |= drawn.samples
        judgements |= drawn.judgements
        for position in positions:
            key = prompt_key(collector, index, planned, position)
            texts = texts_of(rollouts[position])
            made[position] = make_pairs(judgements[position], texts, pairing, key)
        positions = [position for position in positions if made[position].tied]
        if not positions:
            break
    state = PartialState()
    if state.is_main_process:
        _write_pairs(folder / "pairs.jsonl", collector.prompts, planned, rollouts, made)
        report = sampling_report(CollectedSamples(rollouts, judgements))
        counts = asdict(count_pairs(made.values()))
        report = {"round": index, **report, **counts, "redrawn": redrawn}
        write_summed(folder / "round.json", json_lines([report]))
    state.wait_for_everyone()
    return seconds


def pairs_are_collected(folder: Path) -> bool:
    """Whether a round's pairs are on disk, with the report that is written last."""
    return (folder / "round.json").exists() and (folder / "pairs.jsonl").exists()


def read_pairs(folder: Path, planned: PlannedRound, prompts: TokenizedPrompts) -> CollectedPairs:
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
    return CollectedPairs(trees, [row["p_chosen"] for row in rows])


def sampled_trees(
    collector: Collector, folder: Path, planned: PlannedRound, *, limit: int
) -> list[PromptTree]:
    """One draw from the policy for each of the first prompts of a collected round.

    Only a plain sample (temperature 1, nothing cut off) is such a draw: the list is empty where no
    part of the mix is plain.
    """
    plain = [
        (part.temperature, part.top_p, part.top_k) == (1, 1, 0)
        for part in collector.sampler.parts
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
    write_summed(path, json_lines(rows))
