"""Everything that turns prompts and completions into feedback."""

from __future__ import annotations

from prefopt.reward_models.reward_model import RewardModel
from prefopt.reward_models.rule import RuleJudge
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer

__all__ = ["RewardModel", "RewardModelConfig", "RewardModelTrainer", "RuleJudge"]
