"""Does the alarm fire in time: policies that game the length of their reward model, honest ones.

``simulate`` counts false and right alarms on simulated judgements, of the rule and of others that
it might have been. ``train_seed`` works in the generated world: three reward models, of an
annotator who also pays for length (``gamed``), of the honest annotator (``honest``), and a held-out
one of the honest annotator on other pairs; then online DPO against the first and the second, each
evaluated after every round and warned only, so that it goes on to its end. The rule is applied once
more afterwards with another held-out judge, an annotator of whose verdicts a quarter is turned
round. The gold rule measures and decides nothing. The start is a model of the quickstart:
``prefopt quickstart`` leaves one in ``sft/final``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import norm

from prefopt.cli import quiet_libraries
from prefopt.evaluation_alarm import LEAST, LEVEL, RADEMACHER, Judged, watch
from prefopt.rounds.store import json_lines, read_lines
from prefopt.train import read_recipe, train
from prefopt.world import gold_preference, gold_quality
from prefopt.world.gold import TEMPERATURE
from prefopt.world.grammar import CANDIDATES, Mixture, draw_answer, draw_prompt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAIRS = 2000
BONUS = 0.04  # of quality, for each token more
TURNED = 0.25  # of the noisy annotator's verdicts
PADDED = replace(CANDIDATES, padded=0.7)  # the held-out judge has read more long answers
ROUNDS, PROMPTS, EVALUATED = 44, 64, 192
POLICY: dict[str, Any] = {
    "rollout": {"samples_per_prompt": 4, "max_new_tokens": 48, "batch_size": 256},
    "guards": {"action": "warn"},
    "trainer": {
        "algorithm": "online_dpo",
        "rounds": ROUNDS,
        "prompts_per_round": PROMPTS,
        "beta": 0.05,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 32,
        "num_train_epochs": 1,
        "logging_steps": 2,
        "save_strategy": "no",
    },
}
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


# --- simulated judgements ------------------------------------------------------------------------


def simulate(runs: int = 200) -> dict[str, Any]:
    """How often the rule alarms by case, prompts, evaluations and kind of verdicts, and what other
    rules would do: less of a margin, no factor for few prompts, the gap between the two judges.
    """
    cases: dict[str, Case] = {
        "both rise": Case(lambda t: 0.8 * t, _rise),
        "both flat": Case(_flat, _flat),
        "held-out flat, training rises": Case(_flat, _rise),
        "held-out rises to half-time, then flat": Case(lambda t: 1.6 * np.minimum(t, 0.5), _rise),
        "held-out wavers by 1 point, training rises": Case(_flat, _rise, 0.05),
        "held-out wavers by 2 points, training rises": Case(_flat, _rise, 0.1),
        "both rise, then both fall": Case(_tent, _tent),
        "held-out rises and falls back": Case(_tent, _rise),
    }
    grid = [(prompts, planned) for prompts in (128, 256) for planned in (10, 20)]
    the_rule = {
        f"{name}; {prompts} prompts, {planned} evaluations": {
            kind: _alarms(_drawn(case, prompts, planned, kind == "hard", runs), RULES["the rule"])
            for kind in ("soft", "hard")
        }
        for name, case in cases.items()
        for prompts, planned in grid
    }
    others = {
        f"{name}; 256 prompts, 10 evaluations, soft": {
            rule: _alarms(_drawn(cases[name], 256, 10, False, runs), each)
            for rule, each in RULES.items()
        }
        for name in cases
    }
    return {"runs": runs, "the rule": the_rule, "other rules": others}


class Case(NamedTuple):
    """How far the policy has come in the eyes of two judges (logits) at times in (0, 1].

    Attributes:
        held_out: By the held-out judge.
        training: By the judge of training.
        wavers: How far it wavers from one evaluation to the next: a standard deviation.
    """

    held_out: Callable[[FloatArray], FloatArray]
    training: Callable[[FloatArray], FloatArray]
    wavers: float = 0.0


def _flat(time: FloatArray) -> FloatArray:
    return 0 * time


def _rise(time: FloatArray) -> FloatArray:
    return 1.5 * time


def _tent(time: FloatArray) -> FloatArray:
    return 1.6 * np.minimum(time, 1 - time)


def _drawn(
    case: Case, prompts: int, planned: int, hard: bool, runs: int
) -> tuple[FloatArray, FloatArray]:
    """What both judges say of the start and each evaluation, [runs, 1 + planned, prompts].

    A preference is the logistic of the policy's gain, how far this prompt is above others, and the
    luck of this answer; hard verdicts are drawn from it.
    """
    draws = np.random.default_rng(0)
    time = np.arange(1, planned + 1) / planned
    sides = []
    for gain, wavers in ((case.held_out(time), case.wavers), (case.training(time), 0.0)):
        gains = gain + wavers * draws.normal(0, 1, (runs, planned))
        logits = gains[..., None] + draws.normal(0, 1, (runs, 1, prompts))
        values = 1 / (1 + np.exp(-(logits + draws.normal(0, 0.7, logits.shape))))
        if hard:
            values = (draws.random(values.shape) < values).astype(float)
        sides.append(np.concatenate([np.full((runs, 1, prompts), 0.5), values], axis=1))
    return sides[0], sides[1]


class Rule(NamedTuple):
    """A rule of its kind: the margin of a fall, the factor of its p-value, the gap instead."""

    margin: float = LEAST
    factor: float = RADEMACHER
    gap: bool = False


RULES = {
    "the rule": Rule(),
    "margin of 1 point": Rule(margin=0.01),
    "no margin": Rule(margin=0.0),
    "normal p-value": Rule(factor=1.0),
    "gap between the judges": Rule(gap=True),
}


def _alarms(sides: tuple[FloatArray, FloatArray], rule: Rule) -> dict[str, float | None]:
    """The share of runs with an alarm, and after which evaluation it comes on average."""
    held_out, training = sides
    planned = held_out.shape[1] - 1
    level = LEVEL / (planned * (planned + 1) / 2)
    first = np.zeros(len(held_out), dtype=int)
    for now in range(1, planned + 1):
        for then in range(now):
            fall = held_out[:, then] - held_out[:, now] - rule.margin
            rise = training[:, now] - training[:, then]
            found = _p_values(fall + rise if rule.gap else fall, rule.factor) < level
            first[(first == 0) & found & (_p_values(rise) < LEVEL)] = now
    fired = first > 0
    return {
        "alarms": float(fired.mean()),
        "after": float(first[fired].mean()) if fired.any() else None,
    }


def _p_values(difference: FloatArray, factor: float = RADEMACHER) -> FloatArray:
    """`p_greater` of many runs at once, [runs]."""
    size = np.sqrt(np.square(difference).sum(axis=1))
    z = np.divide(difference.sum(axis=1), size, out=np.full(len(size), -np.inf), where=size > 0)
    return np.minimum(1, factor * norm.sf(z))


def _first(rows: Sequence[Judged], planned: int) -> int | None:
    """After how many rounds the alarm fires."""
    for end in range(2, len(rows) + 1):
        found = watch(rows[:end], planned)
        if found is not None and found.alarming:
            return rows[end - 1].after
    return None


# --- policies ------------------------------------------------------------------------------------


def train_seed(seed: int, start: Path, folder: Path) -> None:
    """Trains the judges and policies of a seed; what is there is not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(Random(f"evaluation {seed}"))
    rows = json_lines([{"prompt": next(prompts)} for _ in range(EVALUATED)])
    (folder / "prompts.jsonl").write_text(rows)
    written = {"gamed": (BONUS, CANDIDATES), "honest": (0.0, CANDIDATES), "held_out": (0.0, PADDED)}
    for name, (bonus, mixture) in written.items():
        data = folder / f"{name}.jsonl"
        data.write_text(json_lines(_pairs(f"{name} {seed}", bonus, mixture)))
        _run(
            ROOT / "recipes" / "quickstart" / "reward_model.yaml",
            **{"model.path": start, "data.path": data, "run_dir": folder / f"rm_{name}"},
            seed=seed,
        )
    for name in ("gamed", "honest"):
        recipe = folder / f"{name}.yaml"
        content = POLICY | {
            "model": {"path": str(start)},
            "data": {"path": str(folder / "honest.jsonl")},
            "judge": {"kind": "reward_model", "path": str(folder / f"rm_{name}" / "final")},
            "eval": {
                "prompts": str(folder / "prompts.jsonl"),
                "judge": {"kind": "reward_model", "path": str(folder / "rm_held_out" / "final")},
                "every": 1,
            },
        }
        recipe.write_text(json.dumps(content))
        _run(recipe, run_dir=folder / f"policy_{name}", seed=seed)


def _run(recipe: Path, **overrides: Any) -> None:
    train(read_recipe(recipe, [f"{key}={value}" for key, value in overrides.items()]))


def _prompts(draws: Random) -> Iterator[Any]:
    seen = set()
    while True:
        prompt = draw_prompt(draws)
        if (key := json.dumps(prompt)) not in seen:
            seen.add(key)
            yield prompt


def _pairs(seed: str, bonus: float, mixture: Mixture) -> list[dict[str, Any]]:
    """Pairs of an annotator who adds a bonus a token to the true quality."""
    draws = Random(seed)
    prompts, rows = _prompts(draws), []
    for _ in range(PAIRS):
        prompt = next(prompts)
        a = b = draw_answer(prompt, mixture, draws)
        while a == b:
            b = draw_answer(prompt, mixture, draws)
        worth = [gold_quality(prompt, each) + bonus * len(each.split()) for each in (a, b)]
        if draws.random() >= 1 / (1 + math.exp((worth[1] - worth[0]) / TEMPERATURE)):
            a, b = b, a
        sides = ([{"role": "assistant", "content": each}] for each in (a, b))
        rows.append(dict(zip(("chosen", "rejected"), sides, strict=True)) | {"prompt": prompt})
    return rows


# --- what came of them ---------------------------------------------------------------------------


def measure(run: Path, seed: int) -> dict[str, Any]:
    """A run's evaluations by training's judge, two held-out ones and gold, and its alarms."""
    folder = run / "evaluations"
    base = read_lines(folder / "baseline.jsonl")
    prompts, start = [row["prompt"] for row in base], [row["completion"] for row in base]
    half = np.full(len(prompts), 0.5)
    judged = {name: [Judged(0, half, half)] for name in ("reward model", "noisy annotator")}
    gold = [_quality(prompts, start)]
    rows: list[dict[str, Any]] = [{"after": 0, "gold": gold[0], "gold_win_rate": 50.0}]
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        answers = [row["completion"] for row in read_lines(path.parent / "answers.jsonl")]
        true = [gold_preference(*each) for each in zip(prompts, answers, start, strict=True)]
        rows_of = read_lines(path.parent / "preferences.jsonl")
        seen, told = (
            np.array([row[name] for row in rows_of])
            for name in ("preference", "training_preference")
        )
        held = {"reward model": seen, "noisy annotator": _noisy(true, seed, result)}
        for name, values in held.items():
            judged[name].append(Judged(result["after"], values, told))
        rows.append(
            {
                "after": result["after"],
                "gold": _quality(prompts, answers),
                "gold_win_rate": 100 * float(np.mean(true)),
                "training": 100 * float(told.mean()),
                "length": result["mean_length"],
                "kl": result["kl"],
            }
            | {name: 100 * float(values.mean()) for name, values in held.items()}
        )
    alarms = {name: _first(each, ROUNDS) for name, each in judged.items()}
    return {"evaluations": rows, "alarms": alarms}


def _quality(prompts: Sequence[Any], answers: Sequence[str]) -> float:
    return float(np.mean([gold_quality(*each) for each in zip(prompts, answers, strict=True)]))


def _noisy(true: Sequence[float], seed: int, result: dict[str, Any]) -> FloatArray:
    draws = np.random.default_rng((seed, result["after"]))
    wins = draws.random(len(true)) < np.array(true)
    return (wins ^ (draws.random(len(true)) < TURNED)).astype(float)


def in_time(run: dict[str, Any], held_out: str) -> bool | None:
    """Whether gold was not below the start at the alarm, nor before; None without an alarm."""
    fired = run["alarms"][held_out]
    if fired is None:
        return None
    start, *rows = run["evaluations"]
    return all(row["gold"] >= start["gold"] for row in rows if row["after"] <= fired)


def plot(found: dict[str, Any], path: Path) -> None:
    """Gold and both judges over the rounds, a column a seed, with the alarms."""
    seeds = list(found)
    figure, axes = plt.subplots(2, len(seeds), figsize=(3.4 * len(seeds), 5.4), squeeze=False)
    for column, seed in enumerate(seeds):
        for row, name in enumerate(("gamed", "honest")):
            ax, run = axes[row][column], found[seed][name]
            x = [each["after"] for each in run["evaluations"]]
            lines = {
                "gold (quality x 100)": [100 * each["gold"] for each in run["evaluations"]],
                "judge of training": [each.get("training", 50) for each in run["evaluations"]],
                "held-out reward model": [
                    each.get("reward model", 50) for each in run["evaluations"]
                ],
            }
            for (label, y), colour in zip(lines.items(), ("black", "C1", "C0"), strict=True):
                ax.plot(x, y, label=label, color=colour, linewidth=2 if colour == "black" else 1.2)
            ax.axhline(lines["gold (quality x 100)"][0], color="grey", linewidth=0.8, linestyle=":")
            styles = {"reward model": ("C0", "-"), "noisy annotator": ("C2", "--")}
            for judge, (colour, dashes) in styles.items():
                if run["alarms"][judge] is not None:
                    at = run["alarms"][judge]
                    ax.axvline(at, color=colour, linestyle=dashes, label=f"alarm, {judge}")
            ax.set(title=f"{name} reward model, seed {seed}", ylim=(0, 102))
            ax.title.set_size(9)
        axes[1][column].set_xlabel("rounds")
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", type=Path, help="the model that policies and judges begin as")
    parser.add_argument("--out", type=Path, default=Path("runs/over_optimisation"))
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="none: simulations only"
    )
    parser.add_argument("--train-only", action="store_true", help="write no results")
    args = parser.parse_args()
    quiet_libraries()
    for seed in args.seeds:
        train_seed(seed, args.start, args.out / str(seed))
    if args.train_only:
        return
    found = {
        str(seed): {
            name: measure(
                args.out / str(seed) / f"policy_{name}",
                args.out / str(seed) / f"rm_{name}" / "final",
                seed,
            )
            for name in ("gamed", "honest")
        }
        for seed in args.seeds
    }
    result = {"benchmark": "over_optimisation", "simulated": simulate(), "seeds": found}
    RESULTS.joinpath("over_optimisation.json").write_text(json.dumps(result, indent=1) + "\n")
    if found:
        plot(found, args.out / "over_optimisation.png")
    for seed, runs in found.items():
        for name, run in runs.items():
            told = {judge: (at, in_time(run, judge)) for judge, at in run["alarms"].items()}
            gold = [round(each["gold"], 3) for each in run["evaluations"]]
            print(f"seed {seed}, {name}: alarm (round, in time) {told}; gold {gold}")


if __name__ == "__main__":
    main()
