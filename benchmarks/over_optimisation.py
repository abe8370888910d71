"""Does the alarm fire in time: policies that game the length of their reward model, honest ones.

``simulate`` counts false and right alarms on simulated judgements, of the rule and of others that
it might have been. ``measure`` trains the tiny judges and policies of tests/length_gamers.py,
evaluated after every round and warned only, so that they go on to their end. An alarm is in time if
gold, from its best evaluation to the alarm, was never below the start. Run it with the tests
on the path: ``PYTHONPATH=tests python benchmarks/over_optimisation.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from length_gamers import (
    ANNOTATORS,
    EVALUATED,
    JUDGE,
    PAID,
    PAIRS,
    POLICIES,
    POLICY,
    train_seed,
)
from measure import facts
from scipy.stats import norm

from prefopt.cli import quiet_libraries
from prefopt.evaluation_alarm import LEAST, LEVEL, RADEMACHER

RESULTS = Path(__file__).resolve().parent / "results"
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


# --- policies ------------------------------------------------------------------------------------


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """What came of a seed: how often its judges are right on pairs kept back, and its policies."""
    policies = train_seed(seed, folder)
    found: dict[str, Any] = {}
    for name in ANNOTATORS:
        summary = json.loads((folder / f"judge_{name}" / "summary.json").read_text())
        found[f"accuracy of {name}"] = summary["reward_model"]["accuracy"]
    for name, run in policies.items():
        timely = min(run.until_the_alarm()) >= run.gold[0] if run.alarms else None
        found[name] = asdict(run) | {"in_time": timely}
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Gold, both judges and length over the rounds, a column a seed, with the first alarm."""
    seeds = list(found)
    figure, axes = plt.subplots(2, len(seeds), figsize=(3.2 * len(seeds), 5.6), squeeze=False)
    for column, seed in enumerate(seeds):
        for row, name in enumerate(POLICIES):
            ax, run = axes[row][column], found[seed][name]
            lines = {
                "gold x 100": (100 * np.array(run["gold"]), "black"),
                "win rate by the judge of training": (run["training"], "C1"),
                "win rate by the held-out judge": (run["held_out"], "C0"),
                "words in an answer": (run["words"], "C2"),
            }
            for label, (y, colour) in lines.items():
                ax.plot(y, label=label, color=colour, linewidth=2 if colour == "black" else 1.2)
            ax.axhline(100 * run["gold"][0], color="grey", linewidth=0.8, linestyle=":")
            if run["alarms"]:
                ax.axvline(run["alarms"][0], color="C3", linestyle="--", label="first alarm")
            ax.set(ylim=(-5, 102))
            ax.set_title(f"{name} reward model, seed {seed}", size=9)
        axes[1][column].set_xlabel("rounds")
    handles = {h.get_label(): h for ax in axes.flat for h in ax.get_legend_handles_labels()[0]}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", default="runs/over_optimisation", help="where seeds are trained"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "over_optimisation.json")
    parser.add_argument(
        "--seeds", type=int, nargs="*", default=[20, 21, 22, 23, 24], help="none: simulations only"
    )
    args = parser.parse_args()
    quiet_libraries()
    made = facts("over_optimisation", args)
    found = {}
    for seed in args.seeds:
        found[str(seed)] = measure(seed, Path(args.folder) / str(seed))
        for name in POLICIES:
            run = found[str(seed)][name]
            gold = [round(each, 3) for each in run["gold"]]
            print(f"seed {seed}, {name}: alarms {run['alarms'][:1]}, in time {run['in_time']}")
            print(f"  gold {gold}", flush=True)
    result = made | {
        "tiny": {"pairs": PAIRS, "paid": PAID, "prompts": EVALUATED},
        "judge": JUDGE,
        "policy": POLICY,
        "simulated": simulate(),
        "seeds": found,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    if found:
        plot(found, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
