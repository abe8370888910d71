"""``prefopt check``: what a recipe would train on, what is wrong with it and what it would take.

No model is loaded. What training would refuse is an error; what it only leaves out, or what is
merely suspicious, is a warning (docs/check.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from prefopt.budget import budget, look_at_disk, plan_of
from prefopt.check_models import (
    longest_row,
    look_at_judges,
    look_at_machine,
    look_at_policy,
    look_for_model,
)
from prefopt.check_rows import bias_of, look_at_rows, look_for_evaluated
from prefopt.data.findings import Findings
from prefopt.data.report import data_report
from prefopt.data.tokenize import TokenizedPairs
from prefopt.errors import PrefoptError
from prefopt.evaluation_recipe import (
    NO_POLICY,
    EvaluationData,
    evaluation_report,
    evaluation_task,
    read_evaluation_data,
)
from prefopt.launch import accelerate_config, strategy_of
from prefopt.memory import GIB, Machine, memory_report
from prefopt.models.memory import Spread
from prefopt.recipe import Recipe
from prefopt.run_folder import check_run
from prefopt.train import (
    Rows,
    lora_config,
    make_config,
    prompts_of_rounds,
    read_recipe,
    recipe_tokenizer,
)
from prefopt.trainers.dpo import check_labels
from prefopt.trainers.pairs import pair_dataset


def check(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    accelerate: str | None = None,
    processes: int | None = None,
    device_memory: float | None = None,
) -> dict[str, Any]:
    """Surveys a recipe: its keys, its rows, its tokenizers and what it needs.

    Args:
        recipe_path: The YAML file.
        overrides: As for `prefopt train`.
        accelerate: How the run is to be spread: a name or path, see `prefopt.launch`; None: as the
            same `prefopt train` would be, by DDP.
        processes: Devices; None: 1.
        device_memory: GiB of each; None: as much as a GPU of this machine has, if there is one.

    Returns:
        ``findings``, a list of :class:`prefopt.data.findings.Finding` as dicts, errors first;
        ``errors`` and ``warnings``, how many there are. As far as errors let it see, also
        ``recipe`` (resolved), ``train`` and, where rows are held out, ``evaluation``: see
        :func:`prefopt.data.report.data_report`; of pairs ``length_bias``, see
        :func:`prefopt.check_rows.length_bias`; of an algorithm that samples ``rounds``,
        the prompts of each round, and ``samples``, how many are drawn for each; with a section
        ``eval`` ``win_rate``, see :func:`prefopt.evaluation_recipe.evaluation_report`; ``memory``,
        see :func:`prefopt.memory.memory_report`; and ``budget``, see
        :func:`prefopt.budget.budget`.

    Raises:
        PrefoptError: ``accelerate`` is no such file or name.
    """
    findings = Findings()
    result: dict[str, Any] = {}
    recipe: Recipe | None = None
    args: Any = None
    with findings.of("recipe"):
        recipe = read_recipe(recipe_path, overrides)
        result["recipe"] = recipe.resolved()
    if recipe is not None:
        with findings.of("settings"):
            args = make_config(recipe)
    if recipe is not None and args is not None:
        machine = _machine(args, accelerate, processes, device_memory)
        elsewhere = bool(accelerate or processes or device_memory)
        with findings.of("run folder"):
            check_run(recipe)
        look_at_machine(recipe, args, elsewhere, findings)
        _look(recipe, args, machine, findings, result)
    result["findings"] = [asdict(finding) for finding in findings]
    result["errors"], result["warnings"] = findings.count("error"), findings.count("warning")
    return result


def _look(
    recipe: Recipe, args: Any, machine: Machine, findings: Findings, result: dict[str, Any]
) -> None:
    """Looks at all that a readable recipe names; puts what it finds beside into the result."""
    tokenizer: PreTrainedTokenizerBase | None = None
    config: PreTrainedConfig | None = None
    with findings.of("tokenizer"):
        tokenizer = recipe_tokenizer(recipe)
        config = look_for_model(recipe, findings)
    rows, items = look_at_rows(recipe, args, tokenizer, findings)
    texts: EvaluationData | None = None
    if recipe.eval is not None and recipe.trainer.algorithm not in NO_POLICY:
        with findings.of("evaluation"):
            texts = read_evaluation_data(recipe.eval)
            look_for_evaluated(items, texts.prompts, findings)
    longest = None if rows is None else longest_row(recipe, args, rows.train)
    conversational = any(not isinstance(item.prompt, str) for item in items[:1])
    look_at_judges(recipe, args, tokenizer, longest, conversational, findings)
    if rows is None or tokenizer is None or longest is None:
        return
    result["train"] = data_report(rows.train, tokenizer, invalid=rows.invalid)
    if rows.evaluation is not None:
        result["evaluation"] = data_report(rows.evaluation, tokenizer)
    if (bias := bias_of(rows.train, findings)) is not None:
        result["length_bias"] = bias
    look_at_policy(recipe, config, tokenizer, rows.train, longest, findings)
    if IntervalStrategy(args.eval_strategy) != IntervalStrategy.NO and rows.evaluation is None:
        found = f"trainer.eval_strategy is {IntervalStrategy(args.eval_strategy).value}"
        findings.add("settings", f"{found}, and no rows are held out (data.eval_fraction)")
    if recipe.trainer.algorithm in ("dpo", "hypo"):
        _look_at_labels(args.loss_type, rows, findings)
    _estimate(recipe, args, rows, texts, machine, findings, result)


def _look_at_labels(loss_type: str, rows: Rows, findings: Findings) -> None:
    """Compares p_chosen and margin of pairs with what the loss can use."""
    for part in (rows.train, rows.evaluation):
        if isinstance(part, TokenizedPairs):
            pairs = pair_dataset(part)
            with findings.of("soft labels"):
                check_labels(loss_type, pairs, "data")
            if "margin" in pairs.columns:
                findings.add("margin not used", "dpo and hypo do not use the column 'margin'")


def _estimate(
    recipe: Recipe,
    args: Any,
    rows: Rows,
    texts: EvaluationData | None,
    machine: Machine,
    findings: Findings,
    result: dict[str, Any],
) -> None:
    """Puts into the result what the run would do, need and take."""
    rounds: list[int] = []
    try:
        rounds = prompts_of_rounds(args, rows)
    except PrefoptError as error:
        findings.add("rounds", str(error))
        return
    if rounds:
        result["rounds"] = rounds
        result["samples"] = args.samples_drawn(recipe.rollout.samples_per_prompt)
    answers = 0
    if texts is not None:
        with findings.of("evaluation"):
            evaluation_task(recipe, texts, args, rounds)
            result["win_rate"] = evaluation_report(recipe, texts, args, len(rows.train), rounds)
            answers = result["win_rate"]["answers"]
    try:
        memory = memory_report(recipe, args, rows.train, lora_config(recipe), machine)
    except ValueError as error:  # how PEFT refuses modules that are not there
        findings.add("settings", f"model.lora: {error}")
        return
    result["memory"] = memory | {"machine": asdict(machine)}
    if memory.get("fits") is False:
        findings.add("memory", memory["verdict"])
    plan = plan_of(recipe, args, len(rows.train), rounds, machine.spread.processes)
    result["budget"] = budget(recipe, args, rows.train, plan, memory, machine, answers)
    look_at_disk(result["budget"], recipe.run_dir, findings)


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
