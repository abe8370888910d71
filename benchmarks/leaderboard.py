"""A whole AlpacaEval 2 leaderboard: 200 made-up models, 805 instructions, cross-validation.

The peer is scikit-learn's liblinear, which is what published values come from: the same folds and
values of C, every soft label as two weighted rows. It rates only some of the models.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import facts
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from prefopt.eval.annotations import Annotations
from prefopt.eval.l1_logistic import log_loss, sigmoid
from prefopt.eval.leaderboard import leaderboard
from prefopt.eval.length_control import FOLDS, GRID, bootstrap_length_controlled
from prefopt.eval.length_design import GAMED_WEIGHT, Rows, gamed_rows

FloatArray = np.ndarray


def instructions(rng: np.random.Generator, n: int) -> tuple[FloatArray, FloatArray, dict]:
    """Difficulties, lengths of the baseline's answers, and two gamed rows an instruction."""
    difficulty = rng.normal(size=n)
    baseline = np.exp(rng.normal(7.5, 0.6, size=n)).round()
    length = np.concatenate([rng.normal(shift, 1, n) for shift in (-1, 1)])
    twice = np.tile(difficulty, 2)
    gamed = {
        "preference": sigmoid(-1.3 * np.tanh(length) + 0.2 * twice + rng.normal(size=2 * n)),
        "std_delta_len": length,
        "instruction_difficulty": twice,
    }
    return difficulty, baseline, gamed


def model(
    rng: np.random.Generator, name: str, difficulty: FloatArray, baseline: FloatArray
) -> Annotations:
    """A model of some quality and wordiness; preferences are nearly hard, as GPT-4's are."""
    own = (baseline * np.exp(rng.normal(rng.normal(-0.3, 0.4), 0.4, len(baseline)))).round()
    x = np.tanh((baseline - own) / (baseline - own).std(ddof=1))
    p = sigmoid(-1.5 * x + rng.uniform(0.3, 1) * difficulty + rng.normal(-1, 1.5))
    labels = np.clip(rng.beta(0.3 * p + 1e-3, 0.3 * (1 - p) + 1e-3), 0, 1)
    names = [f"instruction {i}" for i in range(len(baseline))]
    return Annotations(name, "baseline", names, 1 + labels, own, baseline)


def liblinear(rows: Annotations, difficulty: FloatArray, gamed: dict) -> float:
    """The length-controlled win rate by scikit-learn."""
    ours = Rows.read(rows.preferences, rows.model_lengths, rows.baseline_lengths, difficulty)
    extra, extra_labels = gamed_rows(gamed, True)
    features = np.concatenate([ours.features(), extra])
    labels = np.concatenate([ours.labels, extra_labels])
    sizes = (len(ours.labels), len(extra))
    weights = np.repeat((1.0, GAMED_WEIGHT), sizes)
    folds = np.concatenate([np.arange(size) for size in sizes]) % FOLDS

    def fit(c: float, used: FloatArray) -> FloatArray:
        w, y = weights[used], labels[used]
        regression = LogisticRegression(
            l1_ratio=1, solver="liblinear", fit_intercept=False, C=c, max_iter=1000
        )
        twice = np.concatenate([features[used]] * 2)
        hard = np.repeat([1, 0], len(y))
        regression.fit(twice, hard, sample_weight=np.concatenate([w * y, w * (1 - y)]))
        coefficients: FloatArray = regression.coef_[0]
        return coefficients

    def score(c: float) -> float:
        losses = []
        for fold in range(FOLDS):
            held = folds == fold
            loss = log_loss(features[held] @ fit(c, ~held), labels[held])
            losses.append(np.average(loss, weights=weights[held]))
        return float(np.mean(losses))

    w = fit(min(GRID, key=score), np.ones(len(labels), dtype=bool))
    return 100 * float(sigmoid(ours.features()[:, 1:] @ w[1:]).mean())


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """The result, and its wall and CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--instructions", type=int, default=805)
    parser.add_argument("--peer-models", type=int, default=5, help="how many scikit-learn rates")
    parser.add_argument("--samples", type=int, default=1000, help="of one model's bootstrap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, no text")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    difficulty, baseline, gamed = instructions(rng, args.instructions)
    names = [f"model {i}" for i in range(args.models)]
    models = {name: model(rng, name, difficulty, baseline) for name in names}
    difficulties = dict.fromkeys(names, difficulty)

    board, whole = timed(
        lambda: leaderboard(models, instruction_difficulty=difficulties, gamed=gamed)
    )
    ours = {row.model: row.length_controlled_winrate for row in board}
    peers = names[: args.peer_models]
    theirs, peer = timed(lambda: [liblinear(models[n], difficulty, gamed) for n in peers])
    first = models[names[0]]
    _, bootstrap = timed(
        lambda: bootstrap_length_controlled(
            first.preferences,
            first.model_lengths,
            first.baseline_lengths,
            instruction_difficulty=difficulty,
            gamed=gamed,
            samples=args.samples,
        )
    )
    result = {
        **facts("leaderboard", args),
        "seconds": {"leaderboard": whole, "liblinear": peer, "bootstrap of one model": bootstrap},
        "milliseconds_a_model": {
            "prefopt": {clock: 1000 * t / len(models) for clock, t in whole.items()},
            "liblinear": {clock: 1000 * t / len(peers) for clock, t in peer.items()},
        },
        "largest_difference": max(abs(ours[n] - t) for n, t in zip(peers, theirs, strict=True)),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    (args.output / "leaderboard-cpu.json").write_text(text + "\n")
    if args.json:
        print(text)
        return result
    each = result["milliseconds_a_model"]
    Console().print(
        f"{args.models} models x {args.instructions} instructions: {whole['wall']:.1f} s "
        f"({whole['cpu']:.1f} s of CPU time), {each['prefopt']['wall']:.0f} ms a model; "
        f"liblinear takes {each['liblinear']['wall']:.0f} ms; length-controlled rates differ by "
        f"at most {result['largest_difference']:.1e} points\n"
        f"bootstrap of one model, {args.samples} resamples: {bootstrap['wall']:.1f} s"
    )
    return result


if __name__ == "__main__":
    main()
