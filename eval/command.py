"""``prefopt eval``: the options of each measure. What runs one is imported when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from typing import Any

# measure -> (module with run(arguments) and print_result(result), what it does)
MEASURES = {
    "win-rate": ("win_rate_command", "Win rate of one model or file of answers over another."),
    "alpaca": ("alpaca", "AlpacaEval 2: win rate over a baseline, length-controlled too."),
    "leaderboard": ("leaderboard_command", "AlpacaEval's leaderboard from files of annotations."),
    "arena": ("arena", "Arena-Hard style: two games a prompt, five-way verdicts."),
    "mt-bench": ("mt_bench", "MT-Bench: two turns, marked by a judge or compared by it."),
    "reward-bench": ("reward_bench", "RewardBench 1 and 2: accuracy of a judge."),
}
Parser = argparse.ArgumentParser
Add = Callable[[str, Any, str], Parser]


def add_measures(evaluate: Parser, add: Callable[[Any, str, Any, str], Parser]) -> None:
    """Adds one sub-command a measure.

    Args:
        evaluate: The parser of ``prefopt eval``.
        add: ``add(sub-parsers, name, run, text)`` makes a sub-command as all others are made.
    """
    measures = evaluate.add_subparsers(required=True, metavar="MEASURE")
    options = {
        "win-rate": _win_rate,
        "alpaca": _alpaca,
        "leaderboard": _leaderboard,
        "arena": _arena,
        "mt-bench": _mt_bench,
        "reward-bench": _reward_bench,
    }
    for name, (_, text) in MEASURES.items():
        parser = add(measures, name, run, text)
        parser.set_defaults(measure=name)
        options[name](parser)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the measure that was asked for and prints its result for people.

    Raises:
        PrefoptError: Something in the options or the files is wrong.
    """
    from prefopt.cli import quiet_libraries

    quiet_libraries()
    module = import_module(f"prefopt.eval.{MEASURES[arguments.measure][0]}")
    result: dict[str, Any] = module.run(arguments)
    if not arguments.json:
        module.print_result(result)
    return result


def add_decoding(parser: Parser, *, temperature: float | None, max_new_tokens: int) -> None:
    """The options on how a model answers; those of ``prefopt generate`` but for its own."""
    if temperature is not None:
        parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=count, default=max_new_tokens)
    parser.add_argument("--batch-size", type=count, default=64, help="answers at a time")
    parser.add_argument("--seed", type=int, default=0)
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes)
    parser.add_argument("--chat-template", help="Jinja file that replaces the model's template")


def count(text: str) -> int:
    """Reads a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _add_judge(parser: Parser, kinds: tuple[str, ...]) -> None:
    parser.add_argument("--judge", required=True, help="folder or Hub id; of an API, the model")
    if len(kinds) > 1:
        parser.add_argument("--judge-kind", default=kinds[0], choices=kinds)
    if "api" in kinds:
        _add_api(parser)


def _add_api(parser: Parser) -> None:
    api = parser.add_argument_group("judges behind an OpenAI-compatible API")
    api.add_argument("--base-url", default="https://api.openai.com/v1", metavar="URL")
    api.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key",
    )
    api.add_argument("--concurrency", type=count, default=16, help="requests at a time")
    api.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("PROMPT", "COMPLETION"),
        help="dollars per million tokens, to count the cost",
    )


JUDGES = ("reward_model", "preference_model", "api")


def _add_pairwise_judge(parser: Parser) -> None:
    _add_judge(parser, JUDGES)
    parser.add_argument(
        "--orders",
        choices=["both", "random"],
        default="both",
        help="of an API: each pair in both orders, or in one drawn from its texts as AlpacaEval",
    )
    parser.add_argument("--judge-temperature", type=float, default=1.0, help="of an API")


def _win_rate(parser: Parser) -> None:
    parser.add_argument("model", help="a file of answers, a folder with a model, or a Hub id")
    parser.add_argument("baseline", help="another")
    parser.add_argument("--prompts", help="JSONL, Parquet or a Hub id; needed for models")
    parser.add_argument("--split", default="train")
    parser.add_argument("--limit", type=count, help="use the first N prompts only")
    parser.add_argument("--out", default="runs/win-rate", help="folder of the result")
    _add_pairwise_judge(parser)
    add_decoding(parser, temperature=0.0, max_new_tokens=512)


def _alpaca(parser: Parser) -> None:
    parser.add_argument("model", help="model_outputs.json, a folder with a model, or a Hub id")
    parser.add_argument(
        "--baseline", required=True, help="the baseline's model_outputs.json, which has the prompts"
    )
    parser.add_argument("--name", help="what to call the model; default: its file's or folder's")
    parser.add_argument("--limit", type=count, help="use the first N instructions only")
    parser.add_argument("--out", help="folder of the result; default: runs/alpaca/NAME")
    _add_pairwise_judge(parser)
    _add_length_control(parser)
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples; 0: no intervals"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="ANNOTATIONS",
        help="annotations.json of other models, to compare with on the same instructions",
    )
    add_decoding(parser, temperature=0.0, max_new_tokens=2048)


def _leaderboard(parser: Parser) -> None:
    parser.add_argument("annotations", nargs="+", help="annotations.json files")
    parser.add_argument(
        "--baseline", help="model_outputs.json with the instructions in AlpacaEval's order"
    )
    parser.add_argument("--out", default="leaderboard.csv", help="CSV file to write")
    _add_length_control(parser)


def _add_length_control(parser: Parser) -> None:
    group = parser.add_argument_group("length control (docs/evaluation.md)")
    group.add_argument(
        "--difficulty", metavar="CSV", help="columns index and instruction_difficulty"
    )
    group.add_argument(
        "--difficulty-by-position",
        action="store_true",
        help="look difficulty up by row number, as AlpacaEval does for models with missing rows",
    )
    group.add_argument("--gamed", metavar="CSV", help="the baseline's verbose and concise variants")
    group.add_argument("--C", type=float, help="of the fit; default: cross-validated")


def _arena(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", help="files of answers, folders with models, Hub ids")
    parser.add_argument("--questions", required=True, help="Arena-Hard's question.jsonl")
    parser.add_argument("--baseline", required=True, help="what all models play against")
    parser.add_argument("--style-control", action="store_true")
    parser.add_argument("--bootstrap", type=count, default=100, metavar="N", help="rounds")
    parser.add_argument("--out", default="runs/arena", help="folder of the result")
    _add_judge(parser, ("api",))
    parser.add_argument("--judge-max-tokens", type=count, default=4096)
    add_decoding(parser, temperature=0.0, max_new_tokens=4096)


def _mt_bench(parser: Parser) -> None:
    parser.add_argument("models", nargs="+", help="files of answers, folders with models, Hub ids")
    parser.add_argument("--questions", required=True, help="MT-Bench's question.jsonl")
    parser.add_argument("--references", help="reference answers (maths, reasoning, coding)")
    parser.add_argument("--mode", choices=["single", "pairwise"], default="single")
    parser.add_argument("--baseline", help="pairwise: what all models are compared with")
    parser.add_argument("--out", default="runs/mt-bench", help="folder of the result")
    _add_judge(parser, ("api",))
    parser.add_argument("--judge-max-tokens", type=count, default=2048)
    add_decoding(parser, temperature=None, max_new_tokens=1024)


def _reward_bench(parser: Parser) -> None:
    _add_judge(parser, ("reward_model", "preference_model"))
    parser.add_argument(
        "--data", required=True, help="file, folder or Hub id with the published columns"
    )
    parser.add_argument("--split", help="default: filtered (RewardBench 1) or test (2)")
    parser.add_argument("--version", type=int, choices=[1, 2], default=1)
    parser.add_argument("--prior-sets", help="RewardBench 1: the prior sets, weighted one half")
    parser.add_argument("--out", default="runs/reward-bench", help="folder of the result")
