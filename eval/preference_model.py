"""What a preference model is worth on held-out pairs: accuracy, position bias, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefopt.eval.reward_model import BUCKET_ORDER, bucket_of
from prefopt.eval.win_rate import accuracy_by, calibration
from prefopt.reward_models.preference_model import position_average
from prefopt.reward_models.preference_trainer import PreferenceModelTrainer
from prefopt.reward_models.reward_model import probability_of_beating


def preference_model_report(trainer: PreferenceModelTrainer) -> dict[str, Any]:
    """Judges a trainer's held-out pairs in both orders.

    Args:
        trainer: With an ``eval_dataset`` of comparisons (`comparison_dataset`); soft labels count
            as shares of votes.

    Returns:
        As `prefopt.eval.reward_model.reward_model_report`, of the mean over both orders:
        ``pairs``, ``accuracy``, ``ece``, ``calibration``, ``accuracy_by_length``. Besides,
        ``position_consistency``, the share of pairs in which both orders name the same winner (an
        order with exactly 1/2 names none), and ``first_position``, the share of all readings that
        name the answer in the first place, 1/2 being unbiased.
    """
    dataset = trainer.eval_dataset
    log_probs = trainer.predict(dataset).predictions.astype(np.float64)
    first_wins = probability_of_beating(log_probs[:, 0] - log_probs[:, 1])
    forth, back = first_wins[0::2], first_wins[1::2]  # the chosen answer stands first, and second
    p = position_average(forth, back)
    outcome = np.asarray(dataset.columns["p_a"], dtype=np.float64)[0::2]
    groups = [bucket_of(difference) for difference in dataset.columns["length_difference"][0::2]]
    result = calibration(p, outcome)
    return {
        "pairs": len(p),
        "accuracy": result.accuracy,
        "position_consistency": float(((forth - 0.5) * (0.5 - back) > 0).mean()),
        "first_position": float((np.sign(first_wins - 0.5) + 1).mean() / 2),
        "ece": result.ece,
        "calibration": result.table,
        "accuracy_by_length": sorted(
            accuracy_by(p, outcome, groups), key=lambda row: BUCKET_ORDER.index(row["group"])
        ),
    }
