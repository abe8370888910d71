"""``prefopt quickstart``: SFT, the judges and every algorithm on the generated world.

Each stage is an ordinary recipe (``recipes/quickstart``) run by ``prefopt train``; an algorithm
joins by adding a recipe there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt.cli import quiet_libraries
from prefopt.data.rows import Message, Prompt, parse_prompt, validate
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
from prefopt.rollout.engine import Completion, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.storage import atomic_write
from prefopt.run_lock import run_lock
from prefopt.train import JUDGE_REPORTS, read_recipe, train
from prefopt.trainers import TRAINERS
from prefopt.world import (
    STYLES,
    WorldPaths,
    build_world,
    gold_preference,
    gold_quality,
    ideal_answer,
)

logger = logging.getLogger(__name__)

RECIPES = Path(str(files("prefopt.recipes"))) / "quickstart"


def available_algorithms() -> list[str]:
    """The policy trainers that have a quickstart recipe, in the order of their table."""
    names = [name for name in TRAINERS if name != "sft"]
    return [name for name in names if (RECIPES / f"{name}.yaml").is_file()]


def quickstart(out: str | Path, *, seed: int = 0, algorithms: Sequence[str] = ()) -> dict[str, Any]:
    """Trains and compares algorithms from one start; goes on where an earlier call stopped.

    Everything is done twice, side by side: where answers have a true quality, and where
    preferences between styles go round in a circle (``intransitive``).

    Args:
        out: Folder of the run.
        seed: Of the world, of training and of sampling.
        algorithms: Names; all when empty.

    Returns:
        What ``summary.json`` says: under ``algorithms``, per algorithm ``win_rate`` over SFT and
        ``win_rate_ci`` (0-100, by the gold rule), ``kl`` to SFT (nats an answer), ``mean_length``
        (tokens), ``gold_quality`` or ``exploitability`` and ``seconds``; accuracy and calibration
        of the judges that were needed; and all of that once more under ``intransitive``.

    Raises:
        PrefoptError: An algorithm has no quickstart recipe, ``out`` holds another run, or another
            process works there.
    """
    folder = Path(out)
    names = list(algorithms) or available_algorithms()
    for name in names:
        if name not in available_algorithms():
            raise PrefoptError(
                f"--algorithms: {name!r} has no quickstart; there are "
                f"{', '.join(available_algorithms())}"
            )
    with run_lock(folder):
        return _quickstart(folder, seed, names)


def _quickstart(folder: Path, seed: int, names: Sequence[str]) -> dict[str, Any]:
    circle = folder / "intransitive"
    world = build_world(folder / "world", seed=seed)
    circular_world = build_world(circle / "world", seed=seed, intransitive=True)
    start = folder / "sft" / "final"
    with _two_processes() as pool:
        sft = pool.submit(
            _stage, RECIPES, "sft", folder / "sft", world.base, world.sft, seed
        ).result()
        common = (RECIPES, names, start, seed)
        jobs = [
            pool.submit(_compare, *common, world, folder, gold=True),
            pool.submit(_compare, *common, circular_world, circle, gold=False),
        ]
        straight, circular = (job.result() for job in jobs)
    summary = {"seed": seed, **straight, "intransitive": circular}
    summary["algorithms"]["sft"]["seconds"] = sft["seconds"]
    for place, result in ((circle, summary["intransitive"]), (folder, summary)):
        atomic_write(place / "summary.json", json.dumps(result, indent=2) + "\n")
        write_report(place)
    return summary


def print_summary(summary: dict[str, Any], out: str | Path) -> None:
    """Shows the summary as tables."""
    console = Console()
    _print_setting(console, summary, "win rate over SFT by the gold rule", "gold_quality")
    title = "intransitive preferences: win rate over SFT by the gold preference"
    _print_setting(console, summary["intransitive"], title, "exploitability")
    console.print(f"report: {Path(out) / 'report.html'}")


def _print_setting(console: Console, result: dict[str, Any], title: str, measure: str) -> None:
    table = Table(title=title)
    label = {"gold_quality": "quality", "exploitability": "exploit."}[measure]
    for column in ("algorithm", "win rate", "95 % interval", "KL", "tokens", label, "seconds"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for name, row in result["algorithms"].items():
        rate = f"{row['win_rate']:.1f} %" if "win_rate" in row else "-"
        interval = "{:.1f} - {:.1f}".format(*row["win_rate_ci"]) if "win_rate" in row else "-"
        numbers = (f"{row['kl']:.2f}", f"{row['mean_length']:.1f}", f"{row[measure]:.3f}")
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "-"
        table.add_row(name, rate, interval, *numbers, seconds)
    console.print(table)
    if result["remark"]:
        console.print(result["remark"])
    for name in JUDGE_REPORTS:
        if name in result:
            judge = result[name]
            console.print(f"{name}: accuracy {judge['accuracy']:.3f}, ECE {judge['ece']:.3f}")


def _two_processes() -> ProcessPoolExecutor:
    """Two processes that share the cores: a model as small as this cannot fill them alone."""
    cores = os.cpu_count() or 1
    return ProcessPoolExecutor(
        max_workers=min(2, cores),
        mp_context=get_context("spawn"),
        initializer=_begin_process,
        initargs=(max(1, cores // 2),),
    )


def _begin_process(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TTY_COMPATIBLE"] = "0"  # bars of two processes would write over each other
    quiet_libraries()


def _compare(
    recipes: Path,
    names: Sequence[str],
    start: Path,
    seed: int,
    world: WorldPaths,
    folder: Path,
    gold: bool,
) -> dict[str, Any]:
    """Trains the judges and the algorithms in one world, and measures the results."""
    stages: dict[str, dict[str, Any]] = {}
    for name in names:
        judge = read_recipe(recipes / f"{name}.yaml").judge
        if judge is not None and judge.kind not in stages:
            stages[judge.kind] = _stage(
                recipes, judge.kind, folder / judge.kind, start, world.preferences, seed
            )
        path = None if judge is None else folder / judge.kind / "final"
        stages[name] = _stage(
            recipes, name, folder / name, start, world.preferences, seed, judge=path
        )
        logger.info("%s: %s took %.0f s", folder, name, stages[name]["seconds"])
    models = {"sft": start, **{name: folder / name / "final" for name in names}}
    algorithms = _evaluate(models, world, folder, seed, gold)
    for name in names:
        algorithms[name]["seconds"] = stages[name]["seconds"]
    judges = {kind: stages[kind][kind] for kind in JUDGE_REPORTS if kind in stages}
    return {"algorithms": algorithms, **judges, "remark": remark(algorithms)}


def _stage(
    recipes: Path,
    name: str,
    run: Path,
    model: Path,
    data: Path,
    seed: int,
    *,
    judge: Path | None = None,
) -> dict[str, Any]:
    overrides = {"seed": seed, "run_dir": run, "model.path": model, "data.path": data}
    if judge is not None:
        overrides["judge.path"] = judge
    pairs = [
        f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in overrides.items()
    ]
    return train(read_recipe(recipes / f"{name}.yaml", pairs))


def _evaluate(
    models: Mapping[str, Path], world: WorldPaths, folder: Path, seed: int, gold: bool
) -> dict[str, dict[str, Any]]:
    """Samples every model on the held-out prompts; compares it with the first by the gold rule."""
    prompts: list[Any]  # conversations, all of them
    prompts, _ = validate(read_rows(world.prompts), parse_prompt)
    first, *others = models
    reference = load_policy(str(models[first]))
    texts: dict[str, list[str]] = {}
    result: dict[str, dict[str, Any]] = {}
    wins: dict[str, np.ndarray] = {}
    for name, path in models.items():
        model, tokenizer = load_policy(str(path)), load_tokenizer(str(path))
        answers = _answers(model, tokenizer, prompts, seed)
        write_completions(folder / name / "completions.jsonl", prompts, [[a] for a in answers])
        texts[name] = [answer.text for answer in answers]
        result[name] = {
            "kl": _kl(model, reference, tokenizer, prompts, answers),
            "mean_length": sum(len(a.token_ids) for a in answers) / len(answers),
        }
        if gold:
            qualities = map(gold_quality, prompts, texts[name])
            result[name]["gold_quality"] = sum(qualities) / len(prompts)
        else:
            wins[name] = style_wins(prompts, texts[name])
            result[name] |= exploitability(wins[name])
        if name in others:
            p = [
                gold_preference(prompt, own, base, intransitive=not gold)
                for prompt, own, base in zip(prompts, texts[name], texts[first], strict=True)
            ]
            # with a true quality the better answer wins; in a circle there is only the preference
            rate = win_rate((np.sign(np.array(p) - 0.5) + 1) / 2 if gold else np.array(p))
            result[name] |= {"win_rate": rate.win_rate, "win_rate_ci": list(rate.ci)}
    _write_samples(folder, prompts, texts)
    for name in others:
        if name != "dpo" and "dpo" in wins:
            over = paired_difference(wins[name], wins["dpo"], seed)
            result[name]["exploitability over dpo"] = over
    return result


def style_wins(prompts: Sequence[list[Message]], answers: Sequence[str]) -> np.ndarray:
    """P(a right answer in a style beats the answer) by the intransitive rule, [styles, prompts]."""
    return np.array(
        [
            [
                gold_preference(prompt, ideal_answer(prompt, style), answer, intransitive=True)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            for style in STYLES
        ]
    )


def exploitability(wins: np.ndarray) -> dict[str, float]:
    """How much the best fixed style of right answers gains over a policy's answers.

    The exploitability of a policy is ``max_q P(q beats policy) - 1/2``; here q is one of the three
    styles of the intransitive world, its answers always right, and P the gold preference. It is 0
    for a policy of right answers whose styles are in balance, and at most 1/2.

    Args:
        wins: What :func:`style_wins` found.

    Returns:
        ``exploitability``, and per style its ``P(... beats it)``, means over the prompts.
    """
    means = dict(zip(STYLES, wins.mean(1).tolist(), strict=True))
    shares = {f"P({style} beats it)": value for style, value in means.items()}
    return {"exploitability": max(means.values()) - 0.5, **shares}


def paired_difference(wins: np.ndarray, others: np.ndarray, seed: int) -> list[float]:
    """Exploitability minus another policy's on the same prompts, and its 95 % interval.

    The interval is that of 2,000 bootstrap samples of the prompts: it knows nothing of another
    training run.
    """
    count = wins.shape[1]
    chosen = np.random.default_rng(seed).integers(count, size=(2000, count))
    own, other = (each[:, chosen].mean(2).max(0) for each in (wins, others))
    low, high = np.quantile(own - other, [0.025, 0.975]).tolist()
    return [float(wins.mean(1).max() - others.mean(1).max()), low, high]


def remark(algorithms: Mapping[str, Mapping[str, Any]]) -> str:
    """Says which algorithms end less exploitable than DPO, and whether that is beyond chance."""
    parts = []
    for name, row in algorithms.items():
        if "exploitability over dpo" in row:
            difference, low, high = row["exploitability over dpo"]
            verdict = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
            parts.append(f"{name} {difference:+.3f} ({low:+.3f} to {high:+.3f}, {verdict})")
    if not parts:
        return ""
    compared = "; ".join(parts)
    return f"Exploitability minus that of dpo, with 95 % intervals over prompts: {compared}."


def _write_samples(
    folder: Path, prompts: Sequence[Prompt], texts: Mapping[str, Sequence[str]]
) -> None:
    """The first answers of all models side by side, for the report."""
    samples = [
        {"prompt": _as_text(prompt), "answers": {name: texts[name][i] for name in texts}}
        for i, prompt in enumerate(prompts[:100])
    ]
    atomic_write(folder / "samples.jsonl", "".join(json.dumps(s) + "\n" for s in samples))


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


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
