"""The ``prefopt`` command. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from prefopt import __version__
from prefopt.disk import writing
from prefopt.errors import PrefoptError
from prefopt.eval.command import add_decoding, add_measures, count
from prefopt.preemption import EXIT_CODE, Preempted, watch_sigterm

# their defaults, which depend on beta, stand in prefopt/games/trajectory.py and docs/games.md
GAME_SETTINGS = {
    "eta": "the algorithm's step size, in its own convention (docs/games.md)",
    "tau": "inpo: another name of --beta",
    "kappa": "nash_mp_ema: rate of the target's moving average",
    "lr": "nash_mp_ema: learning rate of the logits, times the number of actions",
    "period": "mpo: steps between renewals of the magnet",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0; 1 where `prefopt check` has found errors; 2 after an error that the user
        can mend (one line on stderr); 75 where SIGTERM ended training and the same command goes
        on; 130 after an interrupt. docs/guards.md has the table.
    """
    arguments = parse(argv)
    # before torch is imported: threads that spin while they wait stall each other on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with writing(Path.cwd(), "a file"):
            result = arguments.run(arguments)
    except PrefoptError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"pre-empted by SIGTERM: {stop}; the same command goes on", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if arguments.json and os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=2))
    return int(arguments.run is _check and result["errors"] > 0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads a command line, on which overrides may stand before, between and after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse gives up a list of positional arguments at the first option
        arguments.overrides += rest
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = argparse.ArgumentParser(
        prog="prefopt", description="Fine-tune chat models on preferences, offline and online."
    )
    parser.add_argument("--version", action="version", version=f"prefopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = partial(_sub_command, commands)

    quick = command("quickstart", _quickstart, "Train and compare all algorithms on a small world.")
    quick.add_argument("--seed", type=int, default=0)
    quick.add_argument("--algorithms", default="", help="comma-separated; default: all")
    quick.add_argument("--out", default="runs/quickstart", help="folder of the run")

    for name, run, text in (
        ("check", _check, "Look for what is wrong with a recipe before a model is loaded."),
        ("train", _train, "Run a recipe, or go on with it."),
    ):
        added = command(name, run, text)
        added.add_argument("recipe", help="a YAML file (docs/recipes.md)")
        added.add_argument("overrides", nargs="*", metavar="section.key=value")
        added.add_argument(
            "--accelerate",
            metavar="NAME",
            help="ddp, fsdp2, zero2, zero3 or an accelerate file (docs/scaling.md)",
        )
        added.add_argument("--num-processes", type=count, metavar="N", help="processes in all")
        if name == "check":
            added.add_argument("--device-memory", type=float, metavar="GIB", help="of one device")

    generate = command("generate", _generate, "Sample a model's answers to a file of prompts.")
    generate.add_argument("model", help="a local folder or a Hub id")
    generate.add_argument("prompts", help="JSONL, Parquet or a Hub id (docs/data.md)")
    generate.add_argument("--out", required=True, help="JSONL file to write")
    generate.add_argument("--split", default="train")
    generate.add_argument("--limit", type=count, help="use the first N prompts only")
    generate.add_argument("--samples", type=int, default=1, help="answers a prompt")
    generate.add_argument("--top-k", type=int, default=0)
    add_decoding(generate, temperature=1.0, max_new_tokens=512)

    text = "Evaluate models and judges."
    add_measures(commands.add_parser("eval", help=text, description=text), _sub_command)

    game = command("game", _game, "Play algorithms on a matrix game, exactly (docs/games.md).")
    game.add_argument("--payoff", required=True, help="JSON list of rows: P(row beats column)")
    game.add_argument("--reference", help="JSON list of probabilities; default: uniform")
    game.add_argument("--algorithm", required=True, help="one, or several separated by commas")
    game.add_argument("--beta", type=float, help="weight of the KL to the reference; default: 0.1")
    game.add_argument("--steps", type=count, default=100)
    for name, text in GAME_SETTINGS.items():
        game.add_argument(f"--{name}", type=float, help=text)
    game.add_argument("--plot", metavar="FILE.png", help="draw the distances against queries")

    report = command("report", _report, "Write report.html for a run, or a folder of runs.")
    report.add_argument("run_dir", help="its folder; report.html and plots/ are written there")
    report.add_argument("--open", action="store_true", help="show it in the browser")

    compare = command("compare", _compare, "Show the runs of several algorithms side by side.")
    compare.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    compare.add_argument("--out", metavar="FOLDER", help="also write report.html and plots/ there")
    return parser


def _sub_command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    added.add_argument("--json", action="store_true", help="print the result as JSON")
    added.set_defaults(run=run)
    return added


def _quickstart(arguments: argparse.Namespace) -> dict[str, Any]:
    quiet_libraries()
    from prefopt.quickstart import print_summary, quickstart

    names = [name.strip() for name in arguments.algorithms.split(",") if name.strip()]
    summary = quickstart(arguments.out, seed=arguments.seed, algorithms=names)
    if not arguments.json:
        print_summary(summary, arguments.out)
    return summary


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    quiet_libraries()
    from prefopt.check import check
    from prefopt.check_print import print_check

    result = check(
        arguments.recipe,
        arguments.overrides,
        accelerate=arguments.accelerate,
        processes=arguments.num_processes,
        device_memory=arguments.device_memory,
    )
    if not arguments.json:
        print_check(result)
    return result


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.accelerate or arguments.num_processes:
        _launch(arguments)
    with watch_sigterm():
        quiet_libraries()
        from prefopt.train import read_recipe, train

        recipe = read_recipe(arguments.recipe, arguments.overrides)
        result = train(recipe)
    if not arguments.json and os.environ.get("RANK", "0") == "0":
        print(f"{result['steps']} steps on {result['rows']} rows; model: {recipe.run_dir}/final")
    return result


def _launch(arguments: argparse.Namespace) -> NoReturn:
    """Becomes the launcher of the same command, once the recipe is known to be right.

    The exit status is the launcher's: 1 for whatever a process ends with but 0.
    """
    if "RANK" in os.environ:
        raise PrefoptError(
            f"--num-processes: found rank {os.environ['RANK']} of processes that a launcher has "
            "started already; leave --accelerate and --num-processes out"
        )
    import torch

    from prefopt.launch import launch_command, launch_environment
    from prefopt.train import read_recipe

    read_recipe(arguments.recipe, arguments.overrides)
    devices = torch.accelerator.device_count()
    words = ["train", arguments.recipe, *arguments.overrides]
    command = launch_command(
        [*words, "--json"] if arguments.json else words,
        arguments.accelerate or "ddp",
        arguments.num_processes,
        devices,
    )
    os.execve(command[0], command, os.environ | launch_environment(devices))


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    quiet_libraries()
    from prefopt.generate import generate_file

    result = generate_file(arguments)
    if not arguments.json:
        print(
            f"{result['completions']} answers to {result['prompts']} prompts in {result['out']}; "
            f"mean length {result['mean_length']:.1f} tokens, {result['finished']:.0%} finished"
        )
    return result


def _game(arguments: argparse.Namespace) -> dict[str, Any]:
    from prefopt.games.command import play_files, print_result

    names = [name.strip() for name in arguments.algorithm.split(",")]
    algorithms = list(dict.fromkeys(names))
    given = {name: getattr(arguments, name) for name in GAME_SETTINGS}
    result = play_files(
        arguments.payoff,
        arguments.reference,
        algorithms,
        beta=arguments.beta,
        steps=arguments.steps,
        settings={name: value for name, value in given.items() if value is not None},
        plot=arguments.plot,
    )
    if not arguments.json:
        print_result(result, algorithms)
    return result


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from prefopt.eval.report import write_report

    path = write_report(arguments.run_dir)
    if not arguments.json:
        print(path)
    if arguments.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return {"report": str(path)}


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    from prefopt.eval.compare_runs import compare_runs, print_comparison

    result = compare_runs(arguments.runs, arguments.out)
    if not arguments.json:
        print_comparison(result)
    return result


def quiet_libraries() -> None:
    """Our own messages on stderr, with the libraries' chatter and bars turned off."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("prefopt").setLevel(logging.INFO if main_process else logging.ERROR)
    logging.getLogger("httpx").setLevel(logging.ERROR)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
