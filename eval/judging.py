"""Judges of an evaluation: loaded from the command's options, their answers kept as they come."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, track

from prefopt.data.rows import Prompt
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.reward_models import load_judge
from prefopt.reward_models.api_judge import ApiJudge
from prefopt.reward_models.chat_api import ChatAPI
from prefopt.rounds.log_probs import weights_fingerprint
from prefopt.rounds.storage import append, digest, read_appended

# pairs judged before they are written down
SHARD = 64


def api_of(arguments: argparse.Namespace, folder: Path) -> ChatAPI:
    """The client of the command's options, its answers cached in a folder."""
    return ChatAPI(
        arguments.judge,
        base_url=arguments.base_url,
        key_variable=arguments.key_variable,
        cache=folder / "api_answers.jsonl",
        concurrency=arguments.concurrency,
        price=tuple(arguments.price) if arguments.price else None,
    )


def judge_of(arguments: argparse.Namespace, folder: Path) -> tuple[Judge, dict[str, Any]]:
    """Loads the judge of the command's options.

    Args:
        arguments: With the options on judges.
        folder: Where an API's answers are cached.

    Returns:
        The judge, and all that its answers depend on, as plain values.

    Raises:
        PrefoptError: It cannot be loaded.
    """
    if arguments.judge_kind == "api":
        judge = ApiJudge(
            api_of(arguments, folder),
            orders=arguments.orders,
            temperature=arguments.judge_temperature,
        )
        return judge, judge.describe()
    return described(arguments.judge_kind, arguments.judge)


def usage_line(usage: dict[str, Any]) -> str:
    """What asking an API has cost, in words, from its `Usage` as a dictionary."""
    line = (
        f"judge: {usage['asked']} requests asked, {usage['cached']} from the cache, "
        f"{usage['retries']} repeated; {usage['prompt_tokens']} prompt and "
        f"{usage['completion_tokens']} completion tokens"
    )
    if usage["refused"]:
        line += f" ({usage['refused']} were refused and are unanswered)"
    if usage["uncounted"]:
        line += f" ({usage['uncounted']} answers came without their number of tokens)"
    return line if usage["cost"] is None else f"{line}; {usage['cost']:.2f} dollars"


def described(kind: str, path: str) -> tuple[Judge, dict[str, Any]]:
    """Loads a judge from a folder or the Hub, with the record of what it is."""
    local = load_judge(kind, path)
    model: Any = local
    return local, {"kind": kind, "path": path, "weights": weights_fingerprint(model.model)}


def judge_pairs(
    judge: Judge,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    a: Sequence[str],
    b: Sequence[str],
    path: Path,
) -> np.ndarray:
    """P(a beats b) of each pair; what is judged survives a killed process.

    Args:
        judge: The judge.
        record: What its answers depend on.
        prompts: Shape [pairs].
        a: Shape [pairs], the first answers.
        b: Shape [pairs], the second answers.
        path: JSON lines with each pair's ``key`` (a hash of the record and the texts) and
            ``preference``; pairs found in it are not judged again.

    Returns:
        float64 [pairs]; NaN where a judge behind an API could not be understood.

    Raises:
        PrefoptError: The judge refuses a pair, a local one says what is no probability, or
            nothing that a judge behind an API says can be read.
    """
    if isinstance(judge, ApiJudge):  # keeps its answers itself
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("judge", total=len(prompts))
            compared = judge.compare(prompts, a, b, done=lambda *_: bar.advance(task))
        values = np.array([comparison.preference for comparison in compared])
        if np.isnan(values).all():
            (said, *_) = [game.answer.text for pair in compared for game in pair.games]
            raise PrefoptError(
                f"judge {judge.api.model}: none of its {len(values)} answers could be read; it "
                f"said {said!r:.40}, expected the token m or M; use a model that follows the "
                "instruction to reply with one of them"
            )
        return values
    return _judge_kept("preference", judge.prefer, record, (prompts, a, b), path)


def judge_scores(
    judge: Judge,
    record: dict[str, Any],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    path: Path,
) -> np.ndarray:
    """The score of each answer; what is scored survives a killed process.

    Args:
        judge: A judge whose scores mean something by themselves.
        record: What they depend on.
        prompts: Shape [answers].
        completions: Shape [answers].
        path: As for `judge_pairs`, with ``score`` in place of ``preference``.

    Returns:
        float64 [answers].

    Raises:
        PrefoptError: The judge refuses an answer or its score is not finite.
    """
    return _judge_kept("score", judge.score, record, (prompts, completions), path)


def _judge_kept(
    name: str,
    ask: Callable[..., np.ndarray],
    record: dict[str, Any],
    columns: tuple[Sequence[Any], ...],
    path: Path,
) -> np.ndarray:
    keys = [_key(record, *row) for row in zip(*columns, strict=True)]
    kept = read_appended(path, key=str)
    known = {row["key"]: row[name] for row in kept if isinstance(row.get(name), int | float)}
    missing = [index for index, key in enumerate(keys) if key not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = [missing[start : start + SHARD] for start in range(0, len(missing), SHARD)]
    console = Console(stderr=True)
    for shard in track(shards, "judge", console=console, transient=True):
        values = ask(*([column[i] for i in shard] for column in columns))
        for index, value in zip(shard, values.tolist(), strict=True):
            if not math.isfinite(value):
                raise PrefoptError(
                    f"judge {record.get('path')}: found {value} as {name} of number "
                    f"{index + 1}, expected a finite number; look at the judge's weights"
                )
            known[keys[index]] = value
            append(path, json.dumps({"key": keys[index], name: value}) + "\n")
    return np.array([known[key] for key in keys])


def _key(record: dict[str, Any], *pair: object) -> str:
    return digest([record, *pair])
