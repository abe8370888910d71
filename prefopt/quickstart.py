"""``prefopt quickstart``: SFT, a reward model and every algorithm on the generated world.

Each stage is an ordinary recipe (``recipes/quickstart``) run by ``prefopt train``; an algorithm
joins by adding a recipe there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.data.rows import Prompt, parse_prompt, validate
from prefopt.data.sources import read_rows
from prefopt.data.template import encode_prompt
from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.eval.report import write_report
from prefopt.eval.win_rate import win_rate
from prefopt.generate import generate_with_progress, write_completions
from prefopt.models.forward import enable_trees
from prefopt.models.load import load_policy, load_tokenizer
from prefopt.models.logprobs import sequence_log_probs
from prefopt.reward_models import RuleJudge
from prefopt.rollout.engine import Completion, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.storage import atomic_write
from prefopt.train import read_recipe, train
from prefopt.trainers import TRAINERS
from prefopt.world import WorldPaths, build_world, gold_quality

RECIPES = files("prefopt.recipes") / "quickstart"


def available_algorithms() -> list[str]:
    """The policy trainers that have a quickstart recipe, in the order of their table."""
    names = [name for name in TRAINERS if name != "sft"]
    return [name for name in names if (RECIPES / f"{name}.yaml").is_file()]


def quickstart(out: str | Path, *, seed: int = 0, algorithms: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and compares algorithms from one start; goes on where an earlier call stopped.

    Args:
        out: Folder of the run.
        seed: Of the world, of training and of sampling.
        algorithms: Names; all when empty.

    Returns:
        What ``summary.json`` says: per algorithm ``win_rate`` over SFT and ``win_rate_ci`` (0-100,
        by the gold rule), ``kl`` to SFT (nats an answer), ``mean_length`` (tokens),
        ``gold_quality`` and ``seconds``; and the reward model's accuracy and calibration.

    Raises:
        PrefoptError: An algorithm has no quickstart recipe, or ``out`` holds another run.
    """
    folder = Path(out)
    names = list(algorithms) or available_algorithms()
    for name in names:
        if name not in available_algorithms():
            raise PrefoptError(
                f"--algorithms: {name!r} has no quickstart; there are "
                f"{', '.join(available_algorithms())}"
            )
    world = build_world(folder / "world", seed=seed)
    stages = {"sft": _stage("sft", world.base, world, folder, seed)}
    start = folder / "sft" / "final"
    stages["reward_model"] = _stage("reward_model", start, world, folder, seed)
    for name in names:
        stages[name] = _stage(name, start, world, folder, seed)
    summary = {
        "seed": seed,
        "algorithms": _evaluate(["sft", *names], world, folder, seed),
        "reward_model": stages["reward_model"]["reward_model"],
    }
    for name, row in summary["algorithms"].items():
        row["seconds"] = stages[name]["seconds"]
    atomic_write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(folder)
    return summary


def print_summary(summary: dict[str, Any], out: str | Path) -> None:
    """Shows the summary as a table."""
    console = Console()
    table = Table(title="win rate over SFT by the gold rule")
    for column in ("algorithm", "win rate", "95 % interval", "KL", "tokens", "quality", "seconds"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for name, row in summary["algorithms"].items():
        rate = f"{row['win_rate']:.1f} %" if "win_rate" in row else "-"
        interval = "{:.1f} - {:.1f}".format(*row["win_rate_ci"]) if "win_rate" in row else "-"
        numbers = (f"{row[key]:.2f}" for key in ("kl", "mean_length", "gold_quality"))
        table.add_row(name, rate, interval, *numbers, f"{row['seconds']:.0f}")
    console.print(table)
    judge = summary["reward_model"]
    console.print(f"reward model: accuracy {judge['accuracy']:.3f}, ECE {judge['ece']:.3f}")
    console.print(f"report: {Path(out) / 'report.html'}")


def _stage(name: str, model: Path, world: WorldPaths, folder: Path, seed: int) -> dict[str, Any]:
    overrides = {
        "seed": seed,
        "run_dir": folder / name,
        "model.path": model,
        "data.path": world.sft if name == "sft" else world.preferences,
    }
    if name not in ("sft", "reward_model"):
        overrides |= {
            "judge.kind": "reward_model",
            "judge.path": folder / "reward_model" / "final",
        }
    pairs = [
        f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in overrides.items()
    ]
    return train(read_recipe(str(RECIPES / f"{name}.yaml"), pairs))


def _evaluate(
    names: Sequence[str], world: WorldPaths, folder: Path, seed: int
) -> dict[str, dict[str, Any]]:
    """Samples every model on the held-out prompts; compares it with the first by the gold rule."""
    prompts, _ = validate(read_rows(world.prompts), parse_prompt)
    judge = RuleJudge(_gold_qualities)
    reference = load_policy(str(folder / names[0] / "final"))
    texts: dict[str, list[str]] = {}
    result: dict[str, dict[str, Any]] = {}
    for name in names:
        path = str(folder / name / "final")
        model, tokenizer = load_policy(path), load_tokenizer(path)
        answers = _answers(model, tokenizer, prompts, seed)
        write_completions(folder / name / "completions.jsonl", prompts, [[a] for a in answers])
        texts[name] = [answer.text for answer in answers]
        result[name] = {
            "kl": _kl(model, reference, tokenizer, prompts, answers),
            "mean_length": sum(len(a.token_ids) for a in answers) / len(answers),
            "gold_quality": float(judge.score(prompts, texts[name]).mean()),
        }
        if name != names[0]:
            rate = win_rate(judge.prefer(prompts, texts[name], texts[names[0]]))
            result[name] |= {"win_rate": rate.win_rate, "win_rate_ci": list(rate.ci)}
    samples = [
        {
            "prompt": _as_text(prompt),
            "answers": {name: texts[name][i] for name in names},
        }
        for i, prompt in enumerate(prompts[:100])
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    atomic_write(folder / "samples.jsonl", lines)
    return result


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _gold_qualities(prompts: list[Any], completions: list[str]) -> list[float]:
    return [gold_quality(p, c) for p, c in zip(prompts, completions, strict=True)]


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int,
) -> list[Completion]:
    engine = TransformersEngine(model, tokenizer, batch_size=128)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    settings = SamplingSettings(max_new_tokens=64, seed=seed)
    return [group[0] for group in generate_with_progress(engine, ids, settings)]


def _kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
) -> float:
    """Mean over the policy's own samples of log pi(y) - log ref(y): estimates KL(pi || ref)."""
    for model in (policy, reference):
        enable_trees(model)
    trees = [
        PromptTree(encode_prompt(tokenizer, prompt), [answer.token_ids])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    gaps = []
    with torch.no_grad():
        for start in range(0, len(trees), 64):
            batch = collate_trees(trees[start : start + 64])
            gaps.append(sequence_log_probs(policy, batch) - sequence_log_probs(reference, batch))
    return torch.cat(gaps).mean().item()
