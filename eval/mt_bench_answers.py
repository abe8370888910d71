"""MT-Bench's answers: two turns of a model, and reference answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.data.rows import Prompt
from prefopt.data.sources import read_rows
from prefopt.errors import PrefoptError
from prefopt.eval.answers import (
    generator_of,
    model_name,
    sample_to_file,
)
from prefopt.eval.questions import Player, Question, read_player
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.store import write_lines

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # all others: 0
WITH_REFERENCE = ("math", "reasoning", "coding")


def answer_both_turns(
    model: str, questions: Sequence[Question], arguments: argparse.Namespace, folder: Path
) -> Player:
    """Has a model answer the first turns, and then the second ones after its own answers.

    Args:
        model: A folder with a model, or a Hub id.
        questions: What a model answers, at the temperature of each question's category.
        arguments: The command's options on decoding.
        folder: Where a model's answers are kept: ``NAME_turn_1.jsonl`` and ``NAME_turn_2.jsonl`` as
            they are made, see `sample_to_file`, and ``NAME.jsonl`` in FastChat's format.

    Raises:
        PrefoptError: It cannot be loaded, or the folder holds the answers of another model.
    """
    generator = generator_of(model, arguments)
    settings = [
        SamplingSettings(
            max_new_tokens=arguments.max_new_tokens,
            temperature=TEMPERATURES.get(question.category, 0.0),
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        for question in questions
    ]
    name = model_name(model)
    said: list[list[str]] = [[] for _ in questions]
    decoding: dict[str, Any] = {}
    for turn in (1, 2):
        prompts = [_conversation(q, before) for q, before in zip(questions, said, strict=True)]
        path = folder / f"{name}_turn_{turn}.jsonl"
        groups, record = sample_to_file(generator, prompts, settings, path)
        decoding[f"turn {turn}"] = record
        said = [
            [*before, group[0]["completion"]] for before, group in zip(said, groups, strict=True)
        ]
    player = Player(name, model, said, decoding)
    write_answers(folder / f"{name}.jsonl", player, questions)
    return player


def _conversation(question: Question, said: Sequence[str]) -> Prompt:
    """What has been said so far, which ends with the user's next turn."""
    messages = []
    for asked, answer in zip(question.turns, said, strict=False):
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question.turns[len(said)]}]


def write_answers(path: Path, player: Player, questions: Sequence[Question]) -> None:
    """Writes a model's answers in FastChat's format (https://github.com/lm-sys/FastChat)."""
    rows = [
        {"question_id": q.id, "model_id": player.name, "choices": [{"index": 0, "turns": turns}]}
        for q, turns in zip(questions, player.answers, strict=True)
    ]
    write_lines(path, rows)


def read_references(
    path: str | Path | None, questions: Sequence[Question]
) -> tuple[list[list[str] | None], list[str]]:
    """Reference answers to the questions on maths, reasoning and coding.

    Args:
        path: A file of answers in FastChat's format; it may answer these questions only. None is a
            file without any.
        questions: All questions.

    Returns:
        The reference's turns for each question, None where its category needs none or has none;
        and the categories that need references and have none at all.

    Raises:
        PrefoptError: The file answers some questions of a category and not this one.
    """
    needing = [question for question in questions if question.category in WITH_REFERENCE]
    answered = (
        set() if path is None else {str(row.get("question_id")) for _, row in read_rows(path)}
    )
    covered = {question.category for question in needing if str(question.id) in answered}
    wanted = [question for question in needing if question.category in covered]
    for question in wanted:
        if str(question.id) not in answered:
            raise PrefoptError(
                f"{path}: no reference answer to question {question.id} ({question.category}), but "
                "to others of its category; add it, or remove the others"
            )
    found: dict[int | str, list[str]] = {}
    if path is not None and wanted:
        turns = read_player(path, wanted, 2).answers
        found = dict(zip((question.id for question in wanted), turns, strict=True))
    without = {question.category for question in needing} - covered
    return [found.get(question.id) for question in questions], sorted(without)
