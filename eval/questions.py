"""Questions of Arena-Hard and MT-Bench, and files of answers to them in their formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt.data.rows import prompt_text
from prefopt.data.sources import Row, read_rows
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.answers import file_name, is_answers_file, model_name, read_answers
from prefopt.rounds.storage import digest


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


@dataclass(frozen=True)
class Player:
    """A model with its answers.

    Attributes:
        name: The model's name.
        source: The file, folder or Hub id they come from.
        answers: The turns of its answer to each question, shape [questions][turns].
        decoding: How they were made, where that is known.
    """

    name: str
    source: str
    answers: list[list[str]]
    decoding: dict[str, Any] | None = None

    def describe(self, length: Callable[[str], int]) -> dict[str, Any]:
        """What a record of an evaluation says of the answers.

        Args:
            length: Of one turn.
        """
        lengths = [length(text) for turns in self.answers for text in turns]
        return {
            "source": self.source,
            "sha256": digest(self.answers),
            "mean_length": sum(lengths) / len(lengths),
            "decoding": self.decoding,
        }


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
    asked = [asdict(question) for question in questions]
    return {"path": str(path), "sha256": digest(asked), "count": len(questions)}


def players_of(
    models: Sequence[str], questions: Sequence[Question], turns: int, make: Callable[[str], Player]
) -> list[Player]:
    """The answers of models; all files are read before any model answers.

    Args:
        models: Files of answers, folders with models, Hub ids.
        questions: What must be answered.
        turns: How many turns each question has.
        make: Has a model answer here; the player is called `model_name`.

    Raises:
        PrefoptError: Answers cannot be read or made, or two models have the same name.
    """
    read = [
        read_player(model, questions, turns) if is_answers_file(model) else None for model in models
    ]
    names: set[str] = set()
    for model, player in zip(models, read, strict=True):
        name = player.name if player else model_name(model)
        if name in names:
            raise PrefoptError(
                f"{model}: found a second model named {name!r}; give each model and the baseline "
                "once, and rename one if they are different"
            )
        names.add(name)
    return [player or make(model) for model, player in zip(models, read, strict=True)]


def read_player(path: str | Path, questions: Sequence[Question], turns: int) -> Player:
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

    Raises:
        PrefoptError: The file cannot be read, is in none of the formats, holds the answers of
            several models or lacks some.
    """
    rows = list(read_rows(path))
    if not {"messages", "choices"} & rows[0][1].keys():
        return _by_text(path, questions, turns)
    named = (row.get("model") or row.get("model_id") or file_name(path) for _, row in rows)
    names = list(dict.fromkeys(map(str, named)))
    if len(names) > 1:
        raise PrefoptError(
            f"{path}: found answers of {len(names)} models ({', '.join(names[:3])}), "
            "expected those of one; split the file"
        )
    wanted = {str(question.id) for question in questions}
    found: dict[str, list[str]] = {}
    for where, row in rows:
        id = str(_id(row, where))
        if id in found:
            raise DataError(where, "question_id", f"found a second answer to {id}; remove one")
        if id in wanted:
            found[id] = _answer_turns(row, where)
            if len(found[id]) != turns:
                raise DataError(where, "turns", f"found {len(found[id])}, expected {turns}")
    answers = _all(path, questions, [found.get(str(question.id)) for question in questions])
    return Player(names[0], str(path), answers)


def _by_text(path: str | Path, questions: Sequence[Question], turns: int) -> Player:
    if turns != 1:
        raise PrefoptError(
            f"{path}: found rows without 'choices' and 'messages'; expected answers of {turns} "
            'turns as FastChat writes them: {"question_id", "model_id", "choices"}'
        )
    answers = read_answers(path)
    texts = {prompt_text(row.prompt): row.text for row in answers.rows if row.sample == 0}
    found = [texts.get(question.turns[0]) for question in questions]
    turns_of = [None if text is None else [text] for text in found]
    return Player(answers.name, str(path), _all(path, questions, turns_of))


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
    column = "messages" if "messages" in row else "choices"
    parts = row.get(column)
    if not isinstance(parts, list) or not parts or not all(isinstance(p, dict) for p in parts):
        raise DataError(where, column, "expected a list of objects, one or more")
    if column == "choices":
        return _texts(parts[0].get("turns"), where, column)
    said = [part.get("content") for part in parts if part.get("role") == "assistant"]
    return _texts(said, where, column)


def _texts(turns: object, where: str, field: str) -> list[str]:
    """Texts that stand bare, or as the content or the answer of an object."""
    if not isinstance(turns, list):
        raise DataError(where, field, f"found {type(turns).__name__}, expected a list of turns")
    texts: list[str] = []
    for turn in turns:
        text = turn.get("answer", turn.get("content")) if isinstance(turn, dict) else turn
        if not isinstance(text, str):
            raise DataError(where, field, f"found {text!r} in place of a turn, expected text")
        texts.append(text)
    return texts


def _id(row: Row, where: str) -> int | str:
    id = row.get("uid", row.get("question_id"))
    if not isinstance(id, int | str):
        raise DataError(where, "question_id", f"found {id!r}, expected a name or a number")
    return id
