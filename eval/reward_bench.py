"""``prefopt eval reward-bench``: RewardBench 1 and 2 from a copy of the data set."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prefopt.errors import PrefoptError
from prefopt.eval.judging import described, judge_pairs, judge_scores
from prefopt.eval.reward_bench_data import (
    Item,
    items_hash,
    pair_ties,
    read_items,
    read_prior_sets,
)
from prefopt.eval.reward_bench_scores import (
    PRIOR_SETS,
    PUBLISHED_ROWS,
    TIES,
    credit,
    overall_score,
    overall_weights,
    section_scores,
    section_weights,
    ties_credits,
    uncertainty,
)
from prefopt.eval.win_rate import FloatArray
from prefopt.judge import Judge
from prefopt.rounds.storage import atomic_write
from prefopt.rounds.store import write_lines
from prefopt.run_folder import environment

Scores = Sequence[Sequence[float]]  # of each row the score of each answer


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores a judge on RewardBench and writes ``result.json`` and ``rows.jsonl``.

    What the judge has said is kept in ``scores.jsonl`` as it comes, so that a killed run goes on.

    Args:
        arguments: The options of ``prefopt eval reward-bench``.

    Returns:
        The result as plain values, scores in 0-100.

    Raises:
        PrefoptError: The data or the judge cannot be read, or a row is none of the data set's.
    """
    version, out = arguments.version, Path(arguments.out)
    items = read_items(arguments.data, version, arguments.split)
    if arguments.prior_sets:
        if version != 1:
            raise PrefoptError("--prior-sets: RewardBench 2 has none; leave the option out")
        items += read_prior_sets(arguments.prior_sets)
    judge, record = described(arguments.judge_kind, arguments.judge)
    scores = score_items(judge, record, items, out / "scores.jsonl")
    lengths = [[float(len(answer)) for answer in item.answers] for item in items]
    result = {
        "benchmark": f"RewardBench {version}",
        **summarise(items, scores, version),
        "longer_wins": plain_scores(earned_by_subset(items, lengths), version),
        "remarks": remarks(items, scores, version, compares_only=_compares_only(judge)),
        "judge": record,
        "data": {
            "path": arguments.data,
            "prior_sets": arguments.prior_sets,
            "rows": len(items),
            "sha256": items_hash(items),
        },
        "environment": environment(),
    }
    write_lines(out / "rows.jsonl", map(_row, items, scores))
    atomic_write(out / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def score_items(judge: Judge, record: dict[str, Any], items: Sequence[Item], path: Path) -> Scores:
    """A judge's score of each answer.

    A judge that only compares gives an answer the mean probability with which it beats the others
    to its prompt; of a pair these are P(chosen beats rejected) and 1 minus it.

    Args:
        judge: The judge.
        record: What it says depends on.
        items: Shape [items].
        path: Where it is kept.

    Returns:
        Shape [items], each [answers].

    Raises:
        PrefoptError: The judge refuses an answer.
    """
    if not _compares_only(judge):
        prompts = [item.prompt for item in items for _ in item.answers]
        answers = [answer for item in items for answer in item.answers]
        flat = judge_scores(judge, record, prompts, answers, path).tolist()
        ends = np.cumsum([0] + [len(item.answers) for item in items]).tolist()
        return [flat[start:end] for start, end in pairwise(ends)]
    duels = [
        (n, i, j)
        for n, item in enumerate(items)
        for i, j in combinations(range(len(item.answers)), 2)
    ]
    prompts = [items[n].prompt for n, _, _ in duels]
    a, b = ([items[duel[0]].answers[duel[side]] for duel in duels] for side in (1, 2))
    won: list[list[list[float]]] = [[[] for _ in item.answers] for item in items]
    probabilities = judge_pairs(judge, record, prompts, a, b, path).tolist()
    for (n, i, j), p in zip(duels, probabilities, strict=True):
        won[n][i].append(p)
        won[n][j].append(1 - p)
    return [[math.fsum(each) / len(each) for each in answers] for answers in won]


def earned_by_subset(items: Sequence[Item], scores: Scores) -> dict[str, FloatArray]:
    """What the rows of each subset earned (of Ties, its questions)."""
    earned: dict[str, list[float]] = {}
    for item, given in zip(items, scores, strict=True):
        if item.subset != TIES:
            earned.setdefault(item.subset, []).append(credit(given))
    by_subset = {subset: np.array(values) for subset, values in earned.items()}
    if pairs := pair_ties(items):
        ref, tied = (
            [(scores[n][: items[n].right], scores[n][items[n].right :]) for n in side]
            for side in zip(*pairs, strict=True)
        )
        by_subset[TIES] = ties_credits(ref, tied)
    return by_subset


def plain_scores(earned: Mapping[str, FloatArray], version: int) -> dict[str, Any]:
    """Scores in 0-100: overall (None where something is missing), of sections and of subsets."""
    subsets = {subset: 100 * float(values.mean()) for subset, values in earned.items()}
    if version == 2:
        whole = PUBLISHED_ROWS[2].keys() == subsets.keys()
        return {
            "overall": sum(subsets.values()) / len(subsets) if whole else None,
            "subsets": subsets,
        }
    sections = section_scores(subsets)
    scores: dict[str, Any] = {"overall": overall_score(sections)}
    if PRIOR_SETS[0] in subsets:
        scores["prior_sets"] = sum(subsets[name] for name in PRIOR_SETS) / len(PRIOR_SETS)
        scores["overall_with_prior_sets"] = overall_score(sections, scores["prior_sets"])
    return scores | {"sections": sections, "subsets": subsets}


def summarise(items: Sequence[Item], scores: Scores, version: int) -> dict[str, Any]:
    """The scores of `plain_scores`, each with its standard error and 95 % interval."""
    earned = earned_by_subset(items, scores)
    plain = plain_scores(earned, version)
    rows = Counter(item.subset for item in items)

    def entry(score: float, weights: Mapping[str, float]) -> dict[str, Any]:
        return {"score": score, **uncertainty(earned, weights)}

    result: dict[str, Any] = {
        name: None if plain[name] is None else entry(plain[name], weights)
        for name, weights in _overall_weights(version).items()
        if name in plain
    }
    if version == 1:
        result["sections"] = {
            section: entry(score, section_weights(section))
            for section, score in plain["sections"].items()
        }
    result["subsets"] = {
        subset: {**entry(score, {subset: 1.0}), "rows": rows[subset]}
        for subset, score in plain["subsets"].items()
    }
    return result


def _overall_weights(version: int) -> dict[str, dict[str, float]]:
    if version == 2:
        return {"overall": dict.fromkeys(PUBLISHED_ROWS[2], 1 / len(PUBLISHED_ROWS[2]))}
    return {
        "overall": overall_weights(prior_sets=False),
        "prior_sets": dict.fromkeys(PRIOR_SETS, 1 / len(PRIOR_SETS)),
        "overall_with_prior_sets": overall_weights(prior_sets=True),
    }


def remarks(
    items: Sequence[Item], scores: Scores, version: int, *, compares_only: bool
) -> list[str]:
    """What keeps the scores from being those of the published benchmark."""
    rows = Counter(item.subset for item in items)
    published = PUBLISHED_ROWS[version]
    found = []
    if missing := [subset for subset in published if subset not in rows]:
        found.append(f"no overall score: without rows of {', '.join(missing)}")
    other = [f"{s} {rows[s]:,} of {n:,}" for s, n in published.items() if rows[s] not in (0, n)]
    if other:
        found.append(f"other numbers of rows than published: {', '.join(other)}")
    if ties := sum(map(_shares_top, items, scores)):
        found.append(f"exact ties of the right answer with others, counted in part: {ties:,} rows")
    if compares_only and version == 2:
        found.append(
            "scores are mean win probabilities against the other answers; those of Ties are not "
            "comparable with the published ones of reward models"
        )
    return found


def print_result(result: dict[str, Any]) -> None:
    """Shows overall score, sections and subsets beside the rule that the longer answer wins."""
    longer = result["longer_wins"]
    table = Table("", "score", "95 %", "rows", "longer wins", title=result["benchmark"])

    def add(name: str, entry: dict[str, Any] | None, rule: float | None, style: str = "") -> None:
        if entry:
            low, high = entry["ci"]
            numbers = f"{entry['score']:.1f}", f"{low:.1f}-{high:.1f}", f"{entry.get('rows', '')}"
            table.add_row(name, *numbers, f"{rule:.1f}", style=style)

    for name in ("overall", "overall_with_prior_sets", "prior_sets"):
        add(name.replace("_", " "), result.get(name), longer.get(name), "bold")
    for part in ("sections", "subsets"):
        table.add_section()
        for name, entry in result.get(part, {}).items():
            add(name, entry, longer[part][name])
    console = Console(markup=False)
    console.print(table)
    for remark in result["remarks"]:
        console.print(remark, style="yellow")


def _shares_top(item: Item, scores: Sequence[float]) -> bool:
    return item.subset != TIES and 0 < credit(scores) < 1


def _compares_only(judge: Judge) -> bool:
    return getattr(judge, "compares_only", False)


def _row(item: Item, scores: Sequence[float]) -> dict[str, Any]:
    return {"id": item.id, "subset": item.subset, "right": item.right, "scores": list(scores)}
