"""Writes the generated world to a directory: data sets as JSONL and an untrained model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.data.rows import Message
from prefopt.errors import PrefoptError
from prefopt.rounds.storage import atomic_directory
from prefopt.world.gold import gold_preference
from prefopt.world.grammar import (
    CANDIDATES,
    DEMONSTRATIONS,
    STYLED,
    draw_answer,
    draw_prompt,
)
from prefopt.world.tokenizer import MAX_LENGTH, world_tokenizer

VERSION = 3  # of grammar, vocabulary and rule: worlds of another one are not mixed with this one's


@dataclass(frozen=True)
class WorldPaths:
    """Where the parts of a written world lie.

    Attributes:
        directory: The world's directory.
        sft: JSONL with ``messages``: demonstrations of mixed quality.
        preferences: JSONL with ``prompt``, ``chosen``, ``rejected``, labelled by the annotator.
        prompts: JSONL with ``prompt``: held out for evaluation.
        base: The untrained model with its tokenizer.
    """

    directory: Path
    sft: Path
    preferences: Path
    prompts: Path
    base: Path


def build_world(
    directory: str | Path,
    *,
    seed: int = 0,
    sft_rows: int = 16000,
    preference_rows: int = 4000,
    prompt_rows: int = 512,
    intransitive: bool = False,
) -> WorldPaths:
    """Writes the world unless the directory already holds it; the same arguments, the same bytes.

    No prompt occurs twice, neither within a file nor between files. The directory is written
    aside and renamed, so that it is either absent or complete.

    Args:
        directory: Where to write; made with its parents.
        seed: Seeds prompts, answers, annotator and weights.
        sft_rows: Rows of ``sft.jsonl``.
        preference_rows: Rows of ``preferences.jsonl``.
        prompt_rows: Rows of ``prompts.jsonl``.
        intransitive: Pairs of answers in three styles, judged by the intransitive rule.

    Raises:
        PrefoptError: The directory exists and holds anything else than this very world.
    """
    directory = Path(directory)
    arguments: dict[str, Any] = {
        "version": VERSION,
        "seed": seed,
        "sft_rows": sft_rows,
        "preference_rows": preference_rows,
        "prompt_rows": prompt_rows,
        "intransitive": intransitive,
    }
    if not _is_written(directory, arguments):
        with atomic_directory(directory) as partial:
            _write(_paths(partial), **{k: v for k, v in arguments.items() if k != "version"})
            (partial / "world.json").write_text(json.dumps(arguments) + "\n")
    return _paths(directory)


def _paths(directory: Path) -> WorldPaths:
    return WorldPaths(
        directory=directory,
        sft=directory / "sft.jsonl",
        preferences=directory / "preferences.jsonl",
        prompts=directory / "prompts.jsonl",
        base=directory / "base",
    )


def _is_written(directory: Path, arguments: dict[str, Any]) -> bool:
    """Whether the world is there; anything else that is there is an error."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    record = directory / "world.json"
    found = json.loads(record.read_text()) if record.is_file() else "something else"
    if found != arguments:
        raise PrefoptError(
            f"{directory}: holds {found}, expected a world made with {arguments}; "
            "choose another directory or remove this one"
        )
    return True


def _write(
    paths: WorldPaths,
    seed: int,
    sft_rows: int,
    preference_rows: int,
    prompt_rows: int,
    intransitive: bool,
) -> None:
    rng = Random(seed)
    prompts = _distinct_prompts(rng)
    _write_jsonl(paths.prompts, ({"prompt": next(prompts)} for _ in range(prompt_rows)))
    _write_jsonl(paths.sft, (_demonstration(next(prompts), rng) for _ in range(sft_rows)))
    pairs = (_preference(next(prompts), rng, intransitive) for _ in range(preference_rows))
    _write_jsonl(paths.preferences, pairs)
    tokenizer = world_tokenizer()
    tokenizer.save_pretrained(paths.base)
    _untrained_model(tokenizer, seed).save_pretrained(paths.base)


def _distinct_prompts(rng: Random) -> Iterator[list[Message]]:
    seen = set()
    while True:
        prompt = draw_prompt(rng)
        key = json.dumps(prompt)
        if key not in seen:
            seen.add(key)
            yield prompt


def _demonstration(prompt: list[Message], rng: Random) -> dict[str, list[Message]]:
    return {"messages": [*prompt, *_reply(draw_answer(prompt, DEMONSTRATIONS, rng))]}


def _preference(prompt: list[Message], rng: Random, intransitive: bool) -> dict[str, list[Message]]:
    """Lets the annotator choose between two different answers."""
    mixture = STYLED if intransitive else CANDIDATES
    a = b = draw_answer(prompt, mixture, rng)
    while a == b:
        b = draw_answer(prompt, mixture, rng)
    if rng.random() >= gold_preference(prompt, a, b, intransitive=intransitive):
        a, b = b, a
    return {"prompt": prompt, "chosen": _reply(a), "rejected": _reply(b)}


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,  # of 32, the smallest that vLLM takes on a CPU
        initializer_range=0.08,  # a narrow model learns to copy sooner from larger weights
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
