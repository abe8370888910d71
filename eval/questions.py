"""Questions of Arena-Hard and MT-Bench, and files of answers to them in their formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefopt.data.sources import Row, read_rows
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.answers import read_answers


@dataclass(frozen=True)
class Question:
    """A question of one or more turns.

    Attributes:
        id: As in the file.
        category: Empty where the file has none.
        turns: What the user says, turn by turn.
    """

    id: int | str
    category: str
    turns: list[str]


def read_questions(path: str | Path, turns: int) -> list[Question]:
    """Reads a ``question.jsonl`` of Arena-Hard (either version) or MT-Bench.

    Args:
        path: Rows with ``uid`` and ``prompt``, or with ``question_id`` and ``turns`` (texts, or
            objects with ``content``); ``category`` may stand beside them.
        turns: How many each question must have.

    Raises:
        PrefoptError: The file cannot be read, a row is no such question or is there twice.
    """
    questions: list[Question] = []
    seen: set[str] = set()
    for where, row in read_rows(path):
        id = _id(row, where)
        found = [row["prompt"]] if "prompt" in row else row.get("turns")
        texts = _texts(found, where, "turns")
        if len(texts) != turns:
            raise DataError(where, "turns", f"found {len(texts)} turns, expected {turns}")
        if str(id) in seen:
            raise DataError(where, "question_id", f"found {id!r} a second time; remove the row")
        seen.add(str(id))
        questions.append(Question(id, str(row.get("category") or ""), texts))
    return questions


def describe_questions(path: str | Path, questions: Sequence[Question]) -> dict[str, Any]:
    """What a record of an evaluation says of its questions."""
    digest = sha256(Path(path).read_bytes()).hexdigest()
    return {"path": str(path), "sha256": digest, "count": len(questions)}


def read_answer_turns(
    path: str | Path, questions: Sequence[Question], turns: int
) -> tuple[str, list[list[str]]]:
    """Reads a model's answers to all questions.

    Three formats are told apart by the first row:

    - Arena-Hard 2: ``uid``, ``model`` and ``messages``, of which the assistant's are taken; their
      content is a text or ``{"answer": text}``;
    - FastChat and Arena-Hard 0.1: ``question_id``, ``model_id`` and ``choices``, of which the first
      is taken; its ``turns`` are texts or ``{"content": text}``;
    - what `prefopt generate` writes, or AlpacaEval's ``model_outputs.json``, for questions of one
      turn; the answers are found by the question's text.

    Args:
        path: The file.
        questions: What must be answered; answers to other questions are left aside.
        turns: How many turns each answer must have.

    Returns:
        The model's name, and the turns of the answer to each question.

    Raises:
        PrefoptError: The file cannot be read, is in none of the formats, holds the answers of
            several models or lacks some.
    """
    rows = list(read_rows(path))
    if not {"messages", "choices"} & rows[0][1].keys():
        return _by_text(path, questions, turns)
    wanted = {str(question.id) for question in questions}
    found: dict[str, list[str]] = {}
    names: dict[str, None] = {}
    for where, row in rows:
        id = str(_id(row, where))
        names[str(row.get("model") or row.get("model_id"))] = None
        if id in found:
            raise DataError(where, "question_id", f"found a second answer to {id}; remove one")
        if id in wanted:
            found[id] = _answer_turns(row, where)
            if len(found[id]) != turns:
                raise DataError(where, "turns", f"found {len(found[id])}, expected {turns}")
    if len(names) > 1:
        raise PrefoptError(
            f"{path}: found answers of {len(names)} models ({', '.join(list(names)[:3])}), "
            "expected those of one; split the file"
        )
    return next(iter(names)), _all(path, questions, [found.get(str(q.id)) for q in questions])


def _by_text(
    path: str | Path, questions: Sequence[Question], turns: int
) -> tuple[str, list[list[str]]]:
    if turns != 1:
        raise PrefoptError(
            f"{path}: found rows without 'choices' and 'messages'; expected answers of {turns} "
            'turns as FastChat writes them: {"question_id", "model_id", "choices"}'
        )
    answers = read_answers(path)
    texts = {
        row.prompt if isinstance(row.prompt, str) else _single(row.prompt): row.text
        for row in answers.rows
        if row.sample == 0
    }
    found = [texts.get(question.turns[0]) for question in questions]
    turns_of = [None if text is None else [text] for text in found]
    return answers.name, _all(path, questions, turns_of)


def _single(messages: Sequence[dict[str, str]]) -> str | None:
    return messages[0]["content"] if len(messages) == 1 else None


def _all(
    path: str | Path, questions: Sequence[Question], found: Sequence[list[str] | None]
) -> list[list[str]]:
    answered = [turns for turns in found if turns is not None]
    if len(answered) < len(questions):
        first = next(q.id for q, turns in zip(questions, found, strict=True) if turns is None)
        raise PrefoptError(
            f"{path}: found answers to {len(answered)} of {len(questions)} questions, expected "
            f"all; the first without one is {first}"
        )
    return answered


def _answer_turns(row: Row, where: str) -> list[str]:
    if "messages" in row:
        said = [m.get("content") for m in row["messages"] if m.get("role") == "assistant"]
        return _texts(said, where, "messages")
    choices = row["choices"]
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise DataError(where, "choices", "expected a list of objects with 'turns'")
    return _texts(choices[0].get("turns"), where, "choices")


def _texts(turns: object, where: str, field: str) -> list[str]:
    """Texts that stand bare, or as the content or the answer of an object."""
    if not isinstance(turns, list):
        raise DataError(where, field, f"found {type(turns).__name__}, expected a list of turns")
    bare = [
        turn.get("answer", turn.get("content")) if isinstance(turn, dict) else turn
        for turn in turns
    ]
    if not all(isinstance(text, str) for text in bare):
        raise DataError(where, field, "found a turn without text, expected text in each")
    return bare


def _id(row: Row, where: str) -> int | str:
    id = row.get("uid", row.get("question_id"))
    if not isinstance(id, int | str):
        raise DataError(where, "question_id", f"found {id!r}, expected a name or a number")
    return id
