"""Everything that turns prompts and completions into feedback."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.reward_models.preference_model import PreferenceModel
from prefopt.reward_models.preference_trainer import PreferenceModelConfig, PreferenceModelTrainer
from prefopt.reward_models.reward_model import RewardModel
from prefopt.reward_models.rule import RuleJudge
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer

__all__ = [
    "JUDGES",
    "PreferenceModel",
    "PreferenceModelConfig",
    "PreferenceModelTrainer",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RuleJudge",
    "load_judge",
]

# kind in a recipe -> judge
JUDGES: dict[str, Any] = {"reward_model": RewardModel, "preference_model": PreferenceModel}


def load_judge(kind: str, path: str, *, device: str | torch.device | None = None) -> Judge:
    """Loads a trained judge.

    Args:
        kind: ``reward_model`` or ``preference_model``.
        path: A local folder or a Hub id.
        device: Where to run; a GPU when there is one.

    Raises:
        PrefoptError: The kind is unknown, or ``path`` holds no judge of that kind.
    """
    if kind not in JUDGES:
        raise PrefoptError(f"judge.kind: found {kind!r}, expected {' or '.join(JUDGES)}")
    judge: Judge = JUDGES[kind].from_pretrained(path, device=device)
    return judge
