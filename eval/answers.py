"""Answers to prompts: read from files, or made by a model and kept as they are made."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from prefopt.data.rows import Prompt, parse_prompt, prompt_text, validate
from prefopt.data.sources import SUFFIXES, Row, read_rows
from prefopt.errors import DataError, PrefoptError
from prefopt.generate import Generator, sample_to_file
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.storage import atomic_write

Key = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        prompt: Text, or messages that end with the user's.
        sample: Which of several answers to the prompt it is, from 0.
        text: The answer.
        dataset: Where the prompt comes from, as AlpacaEval's files say; else empty.
    """

    prompt: Prompt
    sample: int
    text: str
    dataset: str = ""

    @property
    def key(self) -> Key:
        """What an answer and its counterpart have in common."""
        return json.dumps(self.prompt, sort_keys=True), self.sample


@dataclass(frozen=True)
class Answers:
    """The answers of one model.

    Attributes:
        name: The model's name.
        rows: Its answers, in the file's order; no two have the same prompt and sample.
        decoding: How they were made, where that is known.
    """

    name: str
    rows: list[Answer]
    decoding: dict[str, Any] | None = None

    def by_key(self) -> dict[Key, Answer]:
        """The answers under their prompt and sample."""
        return {row.key: row for row in self.rows}


def is_answers_file(model: str) -> bool:
    """Whether a name on the command line means a file of answers and not a model."""
    return Path(model).is_file() or model.endswith(SUFFIXES)


def read_answers(path: str | Path) -> Answers:
    """Reads what `prefopt generate` writes, or AlpacaEval's ``model_outputs.json``.

    The first has the columns prompt, sample and completion, the second instruction, output and
    generator (https://github.com/tatsu-lab/alpaca_eval); both may be JSON, JSON lines or Parquet.

    Raises:
        PrefoptError: The file cannot be read, a row is neither, or one is there twice.
    """
    rows: list[Answer] = []
    names: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    keys: set[Key] = set()
    for where, row in read_rows(path):
        answer = _read_row(row, where, seen)
        if answer.key in keys:
            raise DataError(where, "prompt", "answered before in this file with the same sample")
        keys.add(answer.key)
        names[str(row.get("generator") or file_name(path))] += 1
        rows.append(answer)
    if len(names) > 1:
        raise PrefoptError(
            f"{path}: found answers of {len(names)} generators ({', '.join(sorted(names)[:3])}, "
            "...), expected those of one; split the file"
        )
    return Answers(next(iter(names)), rows)


def _read_row(row: Row, where: str, seen: Counter[str]) -> Answer:
    if "instruction" not in row:
        text = _text(row, where, "completion")
        return Answer(parse_prompt(row, where), _sample(row, where, 0), text)
    instruction = _text(row, where, "instruction")
    sample = _sample(row, where, seen[instruction])
    seen[instruction] += 1
    prompt = [{"role": "user", "content": instruction}]
    return Answer(prompt, sample, _text(row, where, "output"), str(row.get("dataset") or ""))


def _text(row: Row, where: str, column: str) -> str:
    if not isinstance(row.get(column), str):
        raise DataError(where, column, f"found {row.get(column)!r}, expected text")
    text: str = row[column]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            where, column, f"found {half!a}, half of a character at {error.start}; remove it"
        ) from None
    return text


def _sample(row: Row, where: str, default: int) -> int:
    sample = row.get("sample", default)
    if not isinstance(sample, int):
        raise DataError(where, "sample", f"found {sample!r:.40}, expected a whole number")
    return sample


def write_model_outputs(path: Path, answers: Answers) -> None:
    """Writes AlpacaEval's ``model_outputs.json``; prompts of several messages stand as text."""
    rows = [
        {
            "dataset": row.dataset,
            "instruction": prompt_text(row.prompt),
            "output": row.text,
            "generator": answers.name,
        }
        for row in answers.rows
    ]
    atomic_write(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def read_prompts(path: str, split: str = "train", limit: int | None = None) -> list[Prompt]:
    """The prompts of a file, a folder or a data set on the Hub.

    Raises:
        PrefoptError: It cannot be read, or a row holds no prompt.
    """

    def parse(row: Row, where: str) -> Prompt:
        if isinstance(row.get("instruction"), str):
            return [{"role": "user", "content": row["instruction"]}]
        return parse_prompt(row, where)

    prompts, _ = validate(islice(read_rows(path, split=split), limit), parse)
    return prompts


def settings_of(arguments: argparse.Namespace) -> SamplingSettings:
    """The options on decoding as sampling settings."""
    return SamplingSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )


def generator_of(model: str, arguments: argparse.Namespace) -> Generator:
    """Loads a model with the command's options."""
    return Generator(
        model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        batch_size=arguments.batch_size,
    )


def answers_of(
    model: str,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    path: Path,
    name: str | None = None,
) -> Answers:
    """The answers in a file, or those of a model, one to each prompt.

    Args:
        model: A file of answers, a folder with a model, or a Hub id.
        prompts: What a model answers.
        arguments: The command's options on decoding.
        path: Where a model's answers are kept, see `sample_to_file`.
        name: What to call a model; default: its folder's name (of ``RUN/final``, RUN's).

    Raises:
        PrefoptError: Neither can be read, or ``path`` holds the answers of another model.
    """
    if is_answers_file(model):
        return read_answers(model)
    settings = settings_of(arguments)
    completions, record = sample_to_file(generator_of(model, arguments), prompts, settings, path)
    rows = [
        Answer(prompt, 0, group[0]["completion"])
        for prompt, group in zip(prompts, completions, strict=True)
    ]
    return Answers(name or model_name(model), rows, record)


def file_name(path: str | Path) -> str:
    """What to call the model of a file of answers that names none: the file, without its suffix.

    >>> file_name("answers/Qwen2.5-7B.jsonl.gz")
    'Qwen2.5-7B'
    """
    name = Path(path).name
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def model_name(model: str) -> str:
    """A short name for a model's path."""
    parts = [part for part in Path(model).parts if part not in ("/", "final", "..", ".")]
    return parts[-1] if parts else model


def folder_name(name: str) -> str:
    """What a folder of a model is called, whose name may come from a file of answers.

    >>> folder_name("owner/Model-1.5"), folder_name("../..\\0"), folder_name("..")
    ('owner--Model-1.5', '--..-', 'model')
    """
    plain = re.sub(r"[^\w.-]+", "-", name.replace("/", "--"))
    return plain.lstrip(".")[:100] or "model"
