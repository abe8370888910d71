"""``prefopt eval arena``: Arena-Hard style games of models against a baseline, before a judge."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prefopt.errors import PrefoptError
from prefopt.eval.answers import answers_of, model_name
from prefopt.eval.arena_scores import (
    CONTROLS,
    Battle,
    expanded_scores,
    parse_verdict,
    played,
    score_table,
    style_table,
)
from prefopt.eval.judge_prompts import ask, describe_judge, readable, render
from prefopt.eval.judging import api_of, usage_line
from prefopt.eval.questions import (
    Player,
    Question,
    describe_questions,
    players_of,
    read_questions,
)
from prefopt.eval.style import style_differences, style_of
from prefopt.reward_models.chat_api import ChatAPI
from prefopt.rounds.storage import atomic_write
from prefopt.rounds.store import write_lines
from prefopt.run_folder import environment

TEMPLATE = "arena"
GAMES = ("baseline first", "model first")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Has a judge compare models with one baseline on all questions, in both orders.

    Arena-Hard 2 has a baseline for each of its two categories; here there is one for all
    questions, so its categories are evaluated one by one, from a file of questions each.

    Writes into the folder ``--out``: ``answers/`` of models that answer here,
    ``api_answers.jsonl`` (what the judge has said, as it comes: a second run asks only for what is
    missing), ``judgments.jsonl`` (one line a question and model, in Arena-Hard's format) and
    ``result.json``.

    Raises:
        PrefoptError: The options or files are wrong, the API gives up, or nothing that the judge
            says is a verdict.
    """
    out = Path(arguments.out)
    questions = read_questions(arguments.questions, turns=1)
    api = api_of(arguments, out)
    baseline, *players = players_of(
        (arguments.baseline, *arguments.models),
        questions,
        1,
        lambda model: _answered(model, questions, arguments, out / "answers"),
    )
    lines = _play(api, questions, baseline, players, arguments.judge_max_tokens)
    write_lines(out / "judgments.jsonl", lines)
    battles = _battles(lines, questions, baseline, players)
    if not played(battles):
        raise PrefoptError(
            f"{out / 'judgments.jsonl'}: no question has a verdict in both games; look there for "
            "what the judge has said, and raise --judge-max-tokens if it was cut off"
        )
    result = {
        "benchmark": "arena",
        "questions": describe_questions(arguments.questions, questions),
        "baseline": baseline.name,
        "judge": describe_judge(api, TEMPLATE, arguments.judge_max_tokens),
        "bootstrap": {"rounds": arguments.bootstrap, "seed": arguments.seed, "interval": "5-95 %"},
        "tables": _tables(battles, arguments),
        "answers": {player.name: player.describe(_tokens) for player in (baseline, *players)},
        "usage": asdict(api.usage),
        "environment": environment(),
    }
    atomic_write(out / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def print_result(result: dict[str, Any]) -> None:
    """Prints a table for all questions and one for each category."""
    console = Console(markup=False)  # a model may be called [x]
    for category, part in result["tables"].items():
        table = Table("model", title=f"{category}: against {result['baseline']}")
        for column in ("score", "CI, scores", "mean", "CI, questions", "Elo", "dropped"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in part["scores"]:
            table.add_row(
                row["model"],
                _number(row.get("score")),
                _range(row.get("rows_interval")),
                _number(row.get("mean")),
                _range(row.get("questions_interval")),
                _number(row.get("elo"), 0),
                str(row["dropped"]),
            )
        console.print(table)
        if "style_control" in part:
            console.print(_style_table(category, part["style_control"]))
    console.print(
        "Scores in 0-100, the baseline's is 50. Intervals are 5-95 % of bootstraps over expanded "
        "scores, as Arena-Hard has it, or over questions, which is the honest one. Elo: the "
        "baseline has 1000; - where a model has won or lost everything."
    )
    print(usage_line(result["usage"]))


def _style_table(category: str, controlled: dict[str, Any]) -> Table:
    """One row a model, one column a set of features that is held fixed."""
    table = Table("model", title=f"{category}: at the baseline's style (CI, questions)")
    for control in controlled:
        table.add_column(control, justify="right")
    slopes = {name: row for part in controlled.values() for name, row in part["slopes"].items()}
    if unknown := [name for name, row in slopes.items() if row["slope"] is None]:
        table.caption = (
            f"no effect of {', '.join(unknown)} can be told: the difference never varies, or alone "
            "decides the battles (do not quote these scores then)"
        )
    rows = [{row["model"]: row for row in part["models"]} for part in controlled.values()]
    for model in rows[0]:
        found = [part[model] for part in rows]
        table.add_row(
            model,
            *(
                f"{row['score']:.1f} ({_range(row['score_intervals']['questions_interval'])})"
                for row in found
            ),
        )
    return table


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _range(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.1f}-{bounds[1]:.1f}"


def _answered(
    model: str, questions: Sequence[Question], arguments: argparse.Namespace, folder: Path
) -> Player:
    prompts: list[Any] = [[{"role": "user", "content": q.turns[0]}] for q in questions]
    made = answers_of(model, prompts, arguments, folder / f"{model_name(model)}.jsonl")
    return Player(made.name, model, [[row.text] for row in made.rows], made.decoding)


def _play(
    api: ChatAPI,
    questions: Sequence[Question],
    baseline: Player,
    players: Sequence[Player],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Both games of each model on each question, as lines of ``judgments.jsonl``."""
    prompts = [
        render(TEMPLATE, question=question.turns[0], answers=answers)
        for player in players
        for question, (of_model,), (of_baseline,) in zip(
            questions, player.answers, baseline.answers, strict=True
        )
        for answers in ([of_baseline, of_model], [of_model, of_baseline])
    ]
    answers = iter(ask(api, prompts, max_tokens))
    return [
        {
            "uid": question.id,
            "category": question.category,
            "judge": api.model,
            "model": player.name,
            "baseline": baseline.name,
            "games": [_game(order, next(answers)) for order in GAMES],
        }
        for player in players
        for question in questions
    ]


def _game(order: str, answer: Any) -> dict[str, Any]:
    return {
        "order": order,
        "score": parse_verdict(readable(answer)),
        "judgment": {"answer": answer.text},
        "finish_reason": answer.finish_reason,
    }


def _battles(
    lines: Sequence[dict[str, Any]],
    questions: Sequence[Question],
    baseline: Player,
    players: Sequence[Player],
) -> list[Battle]:
    base = [style_of(text) for (text,) in baseline.answers]
    styles = [
        row
        for player in players
        for row in style_differences([style_of(text) for (text,) in player.answers], base)
    ]
    return [
        Battle(
            line["uid"],
            line["category"],
            line["model"],
            expanded_scores(*(game["score"] for game in line["games"])),
            style,
        )
        for line, style in zip(lines, styles, strict=True)
    ]


def _tables(battles: Sequence[Battle], arguments: argparse.Namespace) -> dict[str, Any]:
    """The tables of all questions, and of each category where there are several."""
    categories = list(dict.fromkeys(battle.category for battle in battles))
    parts = {"all questions": list(battles)}
    if len(categories) > 1:
        parts |= {
            name or "no category": [b for b in battles if b.category == name] for name in categories
        }
    tables: dict[str, Any] = {}
    for name, part in parts.items():
        tables[name] = {"scores": score_table(part, arguments.bootstrap, arguments.seed)}
        if arguments.style_control and played(part):
            tables[name]["style_control"] = {
                control: style_table(part, columns, arguments.bootstrap, arguments.seed)
                for control, columns in CONTROLS.items()
            }
    return tables


def _tokens(text: str) -> int:
    return style_of(text).tokens
