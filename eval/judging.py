"""Judges of an evaluation: loaded from the command's options, their answers kept as they come."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from hashlib import sha256
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
from prefopt.rounds.storage import read_appended

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
        PrefoptError: The judge refuses a pair or a local one says what is no probability.
    """
    console = Console(stderr=True)
    if isinstance(judge, ApiJudge):  # keeps its answers itself
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("judge", total=len(prompts))
            compared = judge.compare(prompts, a, b, done=lambda *_: bar.advance(task))
        return np.array([comparison.preference for comparison in compared])
    keys = [_key(record, *pair) for pair in zip(prompts, a, b, strict=True)]
    known = {row["key"]: row["preference"] for row in read_appended(path)}
    missing = [index for index, key in enumerate(keys) if key not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    shards = [missing[start : start + SHARD] for start in range(0, len(missing), SHARD)]
    with path.open("a", encoding="utf-8") as file:
        for shard in track(shards, "judge", console=console, transient=True):
            values = judge.prefer(*([part[i] for i in shard] for part in (prompts, a, b)))
            for index, value in zip(shard, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise PrefoptError(
                        f"judge {record.get('path')}: found {value} for pair {index + 1}, expected "
                        "a probability; look at the judge's weights"
                    )
                known[keys[index]] = value
                file.write(json.dumps({"key": keys[index], "preference": value}) + "\n")
            file.flush()
    return np.array([known[key] for key in keys])


def _key(record: dict[str, Any], *pair: object) -> str:
    return sha256(json.dumps([record, *pair], sort_keys=True).encode()).hexdigest()
