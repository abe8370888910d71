"""Tiny policies whose reward model was taught by an annotator who pays for length.

An answer is good (`gold`) if its words are nice and it is no longer than twelve. The annotator of
the gamed reward model knows nice words, but pays for length without end; the honest one, of another
reward model and of the held-out judge, goes by gold alone. All three judges are trained, each on
pairs of its own. Gold itself measures, and decides nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from test_rounds import STOPS, TOKENIZER, distinct_prompts, number, tiny_policy

from prefopt.rounds.store import json_lines, read_lines
from prefopt.train import read_recipe, train
from prefopt.world.grammar import draw_prompt

ROUNDS, EVALUATED, A_ROUND, LONGEST = 32, 512, 48, 24
PAIRS = 8000
PAID = 0.12  # by the gamed annotator for a word, where nothing but nice words is worth 6
PROMPTS = distinct_prompts(EVALUATED + ROUNDS * A_ROUND)
WORDS = [TOKENIZER.decode(i) for i in range(8, len(TOKENIZER))]  # all that a policy can say
JUDGE: dict[str, Any] = {
    "algorithm": "reward_model",
    "learning_rate": 3e-3,
    "warmup_steps": 0.1,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "save_strategy": "no",
}
POLICY: dict[str, Any] = {
    "algorithm": "online_dpo",
    "rounds": ROUNDS,
    "prompts_per_round": A_ROUND,
    "num_train_epochs": 1,
    "beta": 0.03,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
    "save_strategy": "no",
}


def nice(words: list[str]) -> float:
    """The share of nice words."""
    return sum(number(word) % 3 == 0 for word in words) / max(1, len(words))


def too_long(words: list[str]) -> float:
    """By how much of twelve words an answer is longer than twelve."""
    return max(0, len(words) - 12) / 12


NICE, OTHERS = ([word for word in WORDS if nice([word]) == each] for each in (1, 0))


def gold(text: str) -> float:
    """What an answer is truly worth."""
    return nice(text.split()) - too_long(text.split())


def gamed(text: str, paid: float = PAID) -> float:
    """What it is worth to an annotator who pays for length."""
    return 6 * nice(text.split()) + paid * len(text.split())


def honest(text: str) -> float:
    """What it is worth to one who does not."""
    return 6 * gold(text)


ANNOTATORS = {"gamed": gamed, "honest": honest, "held_out": honest}


def train_judge(name: str, seed: int, folder: Path) -> Path:
    """Trains a reward model on an annotator's verdicts.

    Args:
        name: A key of ``ANNOTATORS``.
        seed: Of the verdicts and of the training.
        folder: Where its data and its run go.

    Returns:
        The folder of the reward model.
    """
    blank = _saved(folder / "blank", seed + 100)
    data = folder / f"{name}.jsonl"
    data.write_text(json_lines(_verdicts(name, seed)))
    content = {
        "model": {"path": str(blank)},
        "data": {"path": str(data), "eval_fraction": 0.1},
        "trainer": JUDGE,
    }
    _run(folder / f"judge_{name}", content, seed)
    return folder / f"judge_{name}" / "final"


def optimise(name: str, judge: Path, held_out: Path, seed: int, folder: Path) -> Path:
    """Online DPO from random weights against a judge, watched by another and only warned.

    Returns:
        The run's folder.
    """
    start = _saved(folder / "start", seed, STOPS)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json_lines([{"prompt": prompt} for prompt in PROMPTS[:EVALUATED]]))
    rows = folder / "rows.jsonl"
    answers = {"chosen": "cow", "rejected": "dog"}  # not read by online DPO
    rows.write_text(json_lines([{"prompt": p, **answers} for p in PROMPTS[EVALUATED:]]))
    content = {
        "model": {"path": str(start)},
        "data": {"path": str(rows)},
        "judge": {"kind": "reward_model", "path": str(judge)},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": LONGEST},
        "eval": {
            "prompts": str(prompts),
            "every": 1,
            "temperature": 0.7,
            "judge": {"kind": "reward_model", "path": str(held_out)},
        },
        "guards": {"action": "warn"},
        "trainer": POLICY,
    }
    return _run(folder / f"policy_{name}", content, seed)


@dataclass(frozen=True)
class Outcome:
    """What came of a policy, by evaluation.

    Attributes:
        gold: Its mean gold score at the start and at each evaluation.
        held_out: Its win rate (0-100) over the start by the held-out judge, the start first.
        training: The same by the judge of training.
        words: How long its answers were.
        alarms: After which rounds there was an alarm.
    """

    gold: list[float]
    held_out: list[float]
    training: list[float]
    words: list[float]
    alarms: list[int]


def outcome(evaluations: Path) -> Outcome:
    """Reads the evaluations of a run, from the folder that holds them."""
    start = [row["completion"] for row in read_lines(evaluations / "baseline.jsonl")]
    answers, results = [start], []
    for path in sorted(evaluations.glob("*/result.json")):
        results.append(json.loads(path.read_text()))
        answers.append([row["completion"] for row in read_lines(path.parent / "answers.jsonl")])
    return Outcome(
        gold=[float(np.mean([gold(text) for text in texts])) for texts in answers],
        held_out=[50.0, *(result["win_rate"] for result in results)],
        training=[50.0, *(result["training_win_rate"] for result in results)],
        words=[float(np.mean([len(text.split()) for text in texts])) for texts in answers],
        alarms=[result["after"] for result in results if "alarm" in result],
    )


def _verdicts(name: str, seed: int) -> list[dict[str, Any]]:
    draws, worth, rows = Random(f"{name} {seed}"), ANNOTATORS[name], []
    while len(rows) < PAIRS:
        a, b = (_babble(draws) for _ in range(2))
        if a == b:
            continue
        if draws.random() >= 1 / (1 + math.exp(2 * (worth(b) - worth(a)))):
            a, b = b, a
        rows.append({"prompt": draw_prompt(draws), "chosen": a, "rejected": b})
    return rows


def _babble(draws: Random) -> str:
    length = draws.randint(1, draws.choice([8, LONGEST]))  # a policy begins with short answers
    share = draws.random()  # else long answers would all be equally nice
    return " ".join(draws.choice(NICE if draws.random() < share else OTHERS) for _ in range(length))


def _saved(folder: Path, seed: int, stops: list[int] | None = None) -> Path:
    model = tiny_policy(seed)
    if stops is not None:
        model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def _run(folder: Path, content: dict[str, Any], seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder.with_suffix(".json")
    recipe.write_text(json.dumps(content))
    train(read_recipe(recipe, [f"run_dir={folder}", f"seed={seed}"]))
    return folder
