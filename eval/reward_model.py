"""What a reward model is worth on held-out pairs: accuracy, calibration, length bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.eval.win_rate import accuracy_by, calibration
from prefopt.reward_models.reward_model import probability_of_beating
from prefopt.reward_models.trainer import RewardModelTrainer

# Buckets of (chosen - rejected) length in tokens: an honest judge is as good in each of them.
LENGTH_BUCKETS = ((-np.inf, -16), (-16, 0), (0, 1), (1, 17), (17, np.inf))


def reward_model_report(trainer: RewardModelTrainer) -> dict[str, Any]:
    """Scores a trainer's held-out pairs.

    Args:
        trainer: With an ``eval_dataset`` of pairs; soft labels count as shares of votes.

    Returns:
        ``accuracy``, ``ece``, the ``calibration`` table and ``accuracy_by_length`` (see
        ``prefopt.eval.win_rate``), fractions in [0, 1], and ``pairs``.
    """
    dataset = trainer.eval_dataset
    scores = trainer.predict(dataset).predictions.astype(np.float64)
    p = probability_of_beating(scores[:, 0] - scores[:, 1])
    outcome = np.asarray(dataset.columns.get("p_chosen", np.ones(len(p))), dtype=np.float64)
    lengths = np.array([[len(c) for c in tree.completions] for tree in dataset.trees])
    result = calibration(p, outcome)
    groups = [bucket_of(int(difference)) for difference in lengths[:, 0] - lengths[:, 1]]
    return {
        "pairs": len(p),
        "accuracy": result.accuracy,
        "ece": result.ece,
        "calibration": result.table,
        "accuracy_by_length": sorted(
            accuracy_by(p, outcome, groups), key=lambda row: BUCKET_ORDER.index(row["group"])
        ),
    }


def _name(low: float, high: float) -> str:
    if high - low == 1:
        return "equal length"
    longer = low >= 0
    near, far = (low, high - 1) if longer else (1 - high, -low)
    span = f"{near:.0f} or more" if np.isinf(far) else f"{near:.0f}-{far:.0f}"
    return f"chosen {span} tokens {'longer' if longer else 'shorter'}"


BUCKET_ORDER = [_name(low, high) for low, high in LENGTH_BUCKETS]


def bucket_of(difference: int) -> str:
    """The name of the bucket of (chosen - rejected) tokens."""
    return next(_name(a, b) for a, b in LENGTH_BUCKETS if a <= difference < b)
