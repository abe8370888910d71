"""Tiny policies whose reward model was taught by an annotator who pays for length.

An answer is good (`gold`) if its words are nice and it is no longer than twelve. The annotator of
the gamed reward model knows nice words, but pays for length without end; two honest ones go by
gold, and teach another reward model and the held-out judge. The three judges are trained from
weights and on pairs of their own. Gold teaches the honest annotators and measures policies; no
score of it reaches training or the alarm.
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

from prefopt.rounds.store import read_lines, write_lines
from prefopt.train import read_recipe, train
from prefopt.world.grammar import draw_prompt

ROUNDS, EVALUATED, A_ROUND, LONGEST = 32, 512, 48, 24
PAIRS = 8000
PAID = 0.12  # by the gamed annotator for a word, where nothing but nice words is worth WHOLE
WHOLE = 6.0
CERTAIN = 2.0  # an annotator's log-odds for a difference of one
PROMPTS = distinct_prompts(EVALUATED + ROUNDS * A_ROUND)
VOCABULARY = [
    TOKENIZER.decode(i) for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids
]
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


NICE, OTHERS = ([word for word in VOCABULARY if nice([word]) == each] for each in (1, 0))


def gold(text: str) -> float:
    """What an answer is truly worth."""
    return nice(text.split()) - too_long(text.split())


def gamed(text: str, paid: float = PAID) -> float:
    """What it is worth to an annotator who pays for length."""
    return WHOLE * nice(text.split()) + paid * len(text.split())


def honest(text: str) -> float:
    """What it is worth to one who does not."""
    return WHOLE * gold(text)


ANNOTATORS = {"gamed": gamed, "honest": honest, "held_out": honest}
POLICIES = ("gamed", "honest")


@dataclass(frozen=True)
class Outcome:
    """What came of a policy, at its start and at each evaluation: after round n at index n.

    Attributes:
        gold: Its mean gold score.
        held_out: Its win rate (0-100) over the start by the held-out judge.
        training: The same by the judge of training.
        words: How long its answers are.
        alarms: After which rounds there was an alarm.
    """

    gold: list[float]
    held_out: list[float]
    training: list[float]
    words: list[float]
    alarms: list[int]

    def until_the_alarm(self) -> list[float]:
        """Gold from its best evaluation up to the first alarm, which has to be there."""
        gold = self.gold[: self.alarms[0] + 1]
        return gold[gold.index(max(gold)) :]


def train_seed(seed: int, folder: Path) -> dict[str, Outcome]:
    """Trains the three judges and both policies; what is there already is not trained again.

    Args:
        seed: Of all that is random.
        folder: Where data and runs go: ``judge_NAME``, ``policy_NAME``.

    Returns:
        What came of each of ``POLICIES``.
    """
    judges = {name: _train_judge(name, seed, folder) for name in ANNOTATORS}
    return {name: _optimise(name, judges, seed, folder) for name in POLICIES}


def _train_judge(name: str, seed: int, folder: Path) -> Path:
    own = Random(f"{name} {seed}").getrandbits(31)
    data = folder / f"{name}.jsonl"
    blank = _saved(folder / f"blank_{name}", own)
    write_lines(data, _verdicts(name, own))
    content = {
        "model": {"path": str(blank)},
        "data": {"path": str(data), "eval_fraction": 0.1},
        "trainer": JUDGE,
    }
    return _run(folder / f"judge_{name}", content, own) / "final"


def _optimise(name: str, judges: dict[str, Path], seed: int, folder: Path) -> Outcome:
    """Online DPO from random weights, watched by the held-out judge and only warned."""
    start = _saved(folder / "start", seed, STOPS)
    prompts, rows = folder / "prompts.jsonl", folder / "rows.jsonl"
    write_lines(prompts, ({"prompt": prompt} for prompt in PROMPTS[:EVALUATED]))
    unread = {"chosen": "cow", "rejected": "dog"}  # online DPO makes its own pairs
    write_lines(rows, ({"prompt": prompt, **unread} for prompt in PROMPTS[EVALUATED:]))
    content = {
        "model": {"path": str(start)},
        "data": {"path": str(rows)},
        "judge": {"kind": "reward_model", "path": str(judges[name])},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": LONGEST},
        "eval": {
            "prompts": str(prompts),
            "every": 1,
            "temperature": 0.7,
            "judge": {"kind": "reward_model", "path": str(judges["held_out"])},
        },
        "guards": {"action": "warn"},
        "trainer": POLICY,
    }
    return outcome(_run(folder / f"policy_{name}", content, seed) / "evaluations")


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
    draws, worth, rows = Random(seed), ANNOTATORS[name], []
    while len(rows) < PAIRS:
        a, b = (_babble(draws) for _ in range(2))
        if a == b:
            continue
        if draws.random() >= 1 / (1 + math.exp(CERTAIN * (worth(b) - worth(a)))):
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
