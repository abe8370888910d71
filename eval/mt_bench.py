"""``prefopt eval mt-bench``: two-turn questions, rated by a judge or compared by it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefopt.errors import PrefoptError
from prefopt.eval.judge_prompts import ask, describe_judge, readable, render
from prefopt.eval.judging import api_of, usage_line
from prefopt.eval.mt_bench_answers import answer_both_turns, read_references
from prefopt.eval.mt_bench_scores import (
    FAILED,
    ROUNDS,
    Mark,
    comparison_scores,
    parse_rating,
    parse_winner,
    preference,
    rating_scores,
)
from prefopt.eval.questions import (
    Player,
    Question,
    describe_questions,
    players_of,
    read_questions,
)
from prefopt.reward_models.chat_api import ChatAnswer, ChatAPI
from prefopt.rounds.storage import atomic_write, digest
from prefopt.rounds.store import write_lines
from prefopt.run_folder import environment

TEMPLATES = {"single": "mt_bench_single", "pairwise": "mt_bench_pair"}
SCORES = {"single": "score", "pairwise": "win_rate_adjusted"}  # mode -> the number that ranks


@dataclass(frozen=True)
class Exam:
    """What all models are asked and judged by: questions, references (or None), the judge."""

    questions: list[Question]
    references: list[list[str] | None]
    api: ChatAPI
    max_tokens: int

    def turns(self) -> Iterator[tuple[int, Question, int]]:
        """Number of the question, the question and the turn (1 or 2), question by question."""
        for number, question in enumerate(self.questions):
            for turn in (1, 2):
                yield number, question, turn

    def shown(self, number: int, turn: int, **answers: Any) -> list[dict[str, Any]]:
        """The conversation up to a turn as the templates have it.

        Args:
            number: Number of the question.
            turn: 1 or 2.
            **answers: ``answer`` or ``answers``, shape [turns], what to show of each turn.
        """
        reference = self.references[number]
        return [
            {
                "question": self.questions[number].turns[k],
                "reference": None if reference is None else reference[k],
                **{name: values[k] for name, values in answers.items()},
            }
            for k in range(turn)
        ]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Has models answer MT-Bench's questions and a judge rate or compare their answers.

    Writes into the folder ``--out``: ``answers/`` of models that answer here,
    ``api_answers.jsonl`` (what the judge has said, as it comes: a second run asks only for what is
    missing), ``judgments.jsonl`` (in FastChat's format: one line a question, turn and model) and
    ``result.json``.

    Raises:
        PrefoptError: The options or files are wrong, the API gives up, or nothing that the judge
            says can be read.
    """
    pairwise = arguments.mode == "pairwise"
    if pairwise != (arguments.baseline is not None):
        raise PrefoptError(
            f"--baseline: found {arguments.baseline!r} with --mode {arguments.mode}; expected a "
            "baseline with --mode pairwise, and only there"
        )
    out = Path(arguments.out)
    questions = read_questions(arguments.questions, turns=2)
    references, without = read_references(arguments.references, questions)
    exam = Exam(questions, references, api_of(arguments, out), arguments.judge_max_tokens)
    players = players_of(
        [arguments.baseline, *arguments.models] if pairwise else arguments.models,
        questions,
        2,
        lambda model: answer_both_turns(model, questions, arguments, out / "answers"),
    )
    if pairwise:
        lines, models = _compare(exam, players[0], players[1:])
    else:
        lines, models = _rate(exam, players, arguments.seed)
    write_lines(out / "judgments.jsonl", lines)
    if all(parts["all"][SCORES[arguments.mode]] is None for parts in models.values()):
        raise PrefoptError(
            f"{out / 'judgments.jsonl'}: nothing that the judge says could be read; look there for "
            "what it has said, and raise --judge-max-tokens if it was cut off"
        )
    result = {
        "benchmark": "mt-bench",
        "mode": arguments.mode,
        "questions": describe_questions(arguments.questions, questions),
        "baseline": players[0].name if pairwise else None,
        "judge": describe_judge(exam.api, TEMPLATES[arguments.mode], arguments.judge_max_tokens),
        "references": None if arguments.references is None else digest(references),
        "judged_without_reference": without,
        "bootstrap": None if pairwise else {"rounds": ROUNDS, "seed": arguments.seed},
        "models": models,
        "answers": {player.name: player.describe(len) for player in players},
        "usage": asdict(exam.api.usage),
        "environment": environment(),
    }
    atomic_write(out / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def print_result(result: dict[str, Any]) -> None:
    """Prints one row a model: all turns, each turn, each category."""
    pairwise = result["mode"] == "pairwise"
    title = f"MT-Bench: win rate over {result['baseline']}" if pairwise else "MT-Bench: 1-10"
    value = SCORES[result["mode"]]
    table = Table("model", title=title)
    for column in ("all", "95 % CI", "turn 1", "turn 2", "failed"):
        table.add_column(column, justify="right")
    names = list(dict.fromkeys(name for m in result["models"].values() for name in m["categories"]))
    by_category = Table("category", *result["models"], title=title)
    for model, parts in result["models"].items():
        ci = parts["all"]["ci"]
        table.add_row(
            model,
            _number(parts["all"][value]),
            "-" if ci is None else f"{ci[0]:.2f} - {ci[1]:.2f}",
            *(_number(parts["turns"][turn][value]) for turn in ("1", "2")),
            str(parts["all"]["failed"]),
        )
    for name in names:
        scores = (parts["categories"][name][value] for parts in result["models"].values())
        by_category.add_row(name or "no category", *map(_number, scores))
    console = Console(markup=False)  # a model may be called [x]
    console.print(table, by_category)
    if result["judged_without_reference"]:
        console.print(
            f"No reference answers: {', '.join(result['judged_without_reference'])} judged "
            "without; give --references."
        )
    print(usage_line(result["usage"]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _rate(
    exam: Exam, players: Sequence[Player], seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines of ``judgments.jsonl``, and each model's scores."""
    prompts = [
        render(TEMPLATES["single"], turns=exam.shown(number, turn, answer=player.answers[number]))
        for player in players
        for number, _, turn in exam.turns()
    ]
    answers = iter(ask(exam.api, prompts, exam.max_tokens))
    lines: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    for player in players:
        marks = []
        for _, question, turn in exam.turns():
            answer = next(answers)
            rating = parse_rating(readable(answer))
            value = None if rating == FAILED else rating
            marks.append(Mark(question.id, question.category, turn, value))
            lines.append(
                {
                    "question_id": question.id,
                    "model": player.name,
                    "judge": [exam.api.model, TEMPLATES["single"]],
                    "turn": turn,
                    "score": rating,
                    "judgment": answer.text,
                    "finish_reason": answer.finish_reason,
                }
            )
        models[player.name] = rating_scores(marks, seed)
    return lines, _best_first(models, SCORES["single"])


def _compare(
    exam: Exam, baseline: Player, players: Sequence[Player]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Lines of ``judgments.jsonl``, and each model's win rates."""
    prompts = [
        render(
            TEMPLATES["pairwise"],
            turns=exam.shown(
                number,
                turn,
                answers=[[a, b] for a, b in zip(*(p.answers[number] for p in order), strict=True)],
            ),
        )
        for player in players
        for number, _, turn in exam.turns()
        for order in ((player, baseline), (baseline, player))
    ]
    answers = iter(ask(exam.api, prompts, exam.max_tokens))
    lines: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    for player in players:
        marks = []
        for _, question, turn in exam.turns():
            games = next(answers), next(answers)
            line = _comparison(exam, question, turn, (player.name, baseline.name), games)
            value = preference(*(parse_winner(readable(game)) for game in games))
            marks.append(Mark(question.id, question.category, turn, value))
            lines.append(line)
        models[player.name] = comparison_scores(marks)
    return lines, _best_first(models, SCORES["pairwise"])


def _comparison(
    exam: Exam,
    question: Question,
    turn: int,
    names: tuple[str, str],
    games: tuple[ChatAnswer, ChatAnswer],
) -> dict[str, Any]:
    """A line in which winners are ``model_1``, ``model_2``, ``tie`` or ``error``."""
    sides = (("A", "B"), ("B", "A"))  # the labels of model 1 and model 2 in each game
    winners = [
        {None: "error", one: "model_1", two: "model_2"}.get(parse_winner(readable(game)), "tie")
        for game, (one, two) in zip(games, sides, strict=True)
    ]
    return {
        "question_id": question.id,
        "model_1": names[0],
        "model_2": names[1],
        "g1_winner": winners[0],
        "g2_winner": winners[1],
        "judge": [exam.api.model, TEMPLATES["pairwise"]],
        "turn": turn,
        "g1_judgment": games[0].text,
        "g2_judgment": games[1].text,
        "finish_reasons": [game.finish_reason for game in games],
    }


def _best_first(models: dict[str, Any], score: str) -> dict[str, Any]:
    def key(name: str) -> float:
        value = models[name]["all"][score]
        return 0.0 if value is None else -value

    return {name: models[name] for name in sorted(models, key=key)}
