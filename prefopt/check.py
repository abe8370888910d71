"""``prefopt check``: what a recipe would train on and need, before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.data.report import data_report
from prefopt.errors import PrefoptError
from prefopt.evaluation_recipe import (
    NO_POLICY,
    check_evaluation_judge,
    evaluation_report,
    evaluation_task,
    read_evaluation_data,
)
from prefopt.launch import accelerate_config, strategy_of
from prefopt.memory import GIB, Machine, memory_report, size
from prefopt.models.memory import Spread
from prefopt.train import (
    check_judge,
    load_rows,
    lora_config,
    make_config,
    prompts_of_rounds,
    read_recipe,
    recipe_tokenizer,
)


def check(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    accelerate: str | None = None,
    processes: int | None = None,
    device_memory: float | None = None,
) -> dict[str, Any]:
    """Reads the recipe, its tokenizer and its rows, and describes the rows and what they need.

    Args:
        recipe_path: The YAML file.
        overrides: As for `prefopt train`.
        accelerate: How the run is to be spread: a name or path, see `prefopt.launch`; None: as the
            same `prefopt train` would be, by DDP.
        processes: Devices; None: 1.
        device_memory: GiB of each; None: as much as a GPU of this machine has, if there is one.

    Returns:
        ``recipe`` (resolved), ``train`` and, where rows are held out, ``evaluation``: see
        :func:`prefopt.data.report.data_report`; of an algorithm that samples also ``rounds``, the
        prompts of each round, ``samples``, how many are drawn for each, and ``judge``, what is
        wrong with the judge, if anything is; with a section ``eval`` also ``win_rate``, see
        :func:`prefopt.evaluation_recipe.evaluation_report`, and in it ``judge`` likewise; and
        ``memory``, see :func:`prefopt.memory.memory_report`.

    Raises:
        PrefoptError: As training on it would, but for a judge that is not there yet.
    """
    recipe = read_recipe(recipe_path, overrides)
    args = make_config(recipe)
    tokenizer = recipe_tokenizer(recipe)
    rows = load_rows(recipe, tokenizer, args)
    result: dict[str, Any] = {
        "recipe": recipe.resolved(),
        "train": data_report(rows.train, tokenizer, invalid=rows.invalid),
    }
    if rounds := prompts_of_rounds(args, rows):
        result["rounds"] = rounds
        result["samples"] = args.samples_drawn(recipe.rollout.samples_per_prompt)
        try:
            check_judge(recipe)
        except PrefoptError as error:  # it may be trained after the recipe is written
            result["judge"] = str(error)
    if recipe.eval is not None and recipe.trainer.algorithm not in NO_POLICY:
        texts = read_evaluation_data(recipe.eval)
        evaluation_task(recipe, texts, args, rounds)
        result["win_rate"] = evaluation_report(recipe, texts, args, len(rows.train), rounds)
        try:
            check_evaluation_judge(recipe)
        except PrefoptError as error:
            result["win_rate"]["judge"] = str(error)
    if rows.evaluation is not None:
        result["evaluation"] = data_report(rows.evaluation, tokenizer)
    machine = _machine(args, accelerate, processes, device_memory)
    result["memory"] = memory_report(recipe, args, rows.train, lora_config(recipe), machine)
    result["memory"]["machine"] = asdict(machine)
    return result


def _machine(
    args: Any, accelerate: str | None, processes: int | None, device_memory: float | None
) -> Machine:
    strategy, bf16 = "ddp", args.bf16
    if accelerate or processes:
        strategy, mixed = strategy_of(accelerate_config(accelerate or "ddp"))
        bf16 = bf16 or mixed
    memory = None if device_memory is None else round(device_memory * GIB)
    gpu = torch.cuda.is_available()
    if memory is None and gpu:
        memory = torch.cuda.get_device_properties(0).total_memory
    device = "cuda" if gpu or accelerate or processes or device_memory else "cpu"
    return Machine(Spread(strategy, processes or 1), bf16, device, memory)


def print_check(result: dict[str, Any]) -> None:
    """Shows the result of :func:`check` as tables and one example in colour."""
    console = Console()
    for part in ("train", "evaluation"):
        if part in result:
            _print_report(console, part, result[part])
    if "rounds" in result:
        rounds, samples = result["rounds"], result["samples"]
        each = " to ".join(f"{n:,}" for n in sorted({min(rounds), max(rounds)}))
        console.print(f"{len(rounds):,} rounds of {each} prompts, {samples} samples each")
    if "judge" in result:
        console.print(f"[yellow]the judge cannot be loaded yet:[/yellow] {result['judge']}")
    if "win_rate" in result:
        _print_win_rate(console, result["win_rate"])
    _print_memory(console, result["memory"])
    example = result["train"]["example"]
    loss = "" if "prompt" in example else " (loss on the green text)"
    console.print(f"\n[bold]example[/bold] {example['where']}{loss}")
    for name, pieces in example.items():
        if name != "where":
            text = Text.assemble(
                *((piece["text"], "green" if piece["loss"] else "dim") for piece in pieces)
            )
            console.print(f"[bold]{name}[/bold]")
            console.print(text)


def _print_win_rate(console: Console, report: dict[str, Any]) -> None:
    every, unit = report["every"], report["unit"]
    console.print(
        f"win rate on {report['prompts']:,} prompts, {report['evaluations']:,} times "
        f"({'every ' + unit if every == 1 else f'every {every} {unit}s'}): "
        f"{report['answers']:,} answers, {report['comparisons']:,} comparisons"
    )
    if "judge" in report:
        console.print(f"[yellow]the judge of evaluations is not ready:[/yellow] {report['judge']}")


def _print_memory(console: Console, memory: dict[str, Any]) -> None:
    if "problem" in memory:
        console.print(f"[yellow]no estimate of the memory:[/yellow] {memory['problem']}")
        return
    table = Table(title="memory a device")
    table.add_column("part")
    table.add_column("estimate", justify="right")
    for name, count in memory["parts"].items():
        if count:
            table.add_row(name, size(count))
    table.add_section()
    table.add_row("at the peak", size(memory["total"]))
    console.print(table)
    for note in memory["notes"]:
        console.print(f"[yellow]{note}[/yellow]")
    precision = "bfloat16" if memory["machine"]["bf16"] else "float32"
    tokens = memory["micro_batch_tokens"]
    console.print(f"the largest micro-batch has {tokens:,} tokens; computed in {precision}")
    console.print(memory["verdict"], soft_wrap=True)


def _print_report(console: Console, part: str, report: dict[str, Any]) -> None:
    table = Table(title=f"{part}: {report['rows']:,} rows")
    for column in ("tokens", "5 %", "50 %", "95 %", "longest"):
        table.add_column(column, justify="left" if column == "tokens" else "right")
    for name, lengths in report["tokens"].items():
        table.add_row(name, *(f"{lengths[k]:,}" for k in ("p5", "p50", "p95", "max")))
    console.print(table)
    for reason, count in {**report["invalid"], **report["dropped"]}.items():
        console.print(f"left out: {count:,} ({reason.replace('_', ' ')})")
    if report["duplicates"]:
        console.print(f"duplicates: {report['duplicates']:,}")
    if "chosen_longer" in report:
        console.print(f"chosen answer longer: {report['chosen_longer']:.1%} of pairs")
