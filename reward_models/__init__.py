"""Everything that turns prompts and completions into feedback."""

from __future__ import annotations

from typing import Any

import torch

from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.reward_models.api_judge import ApiJudge
from prefopt.reward_models.chat_api import ChatAPI, ChatRequest
from prefopt.reward_models.preference_model import PreferenceModel
from prefopt.reward_models.preference_trainer import PreferenceModelConfig, PreferenceModelTrainer
from prefopt.reward_models.reward_model import RewardModel
from prefopt.reward_models.rule import RuleJudge
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
from prefopt.reward_models.vllm_judges import VllmPreferenceModel, VllmRewardModel

__all__ = [
    "JUDGES",
    "ApiJudge",
    "ChatAPI",
    "ChatRequest",
    "PreferenceModel",
    "PreferenceModelConfig",
    "PreferenceModelTrainer",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelTrainer",
    "RuleJudge",
    "VllmPreferenceModel",
    "VllmRewardModel",
    "load_judge",
]

# kind in a recipe -> judge
JUDGES: dict[str, Any] = {"reward_model": RewardModel, "preference_model": PreferenceModel}
VLLM_JUDGES: dict[str, Any] = {
    "reward_model": VllmRewardModel,
    "preference_model": VllmPreferenceModel,
}


def load_judge(
    kind: str,
    path: str,
    *,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    engine: str = "transformers",
    gpu_memory: float = 0.3,
) -> Judge:
    """Loads a trained judge.

    Args:
        kind: ``reward_model`` or ``preference_model``.
        path: A local folder or a Hub id.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        device: Where to run under transformers; a GPU when there is one.
        engine: ``transformers`` or ``vllm``.
        gpu_memory: Share of the GPU's memory that vLLM takes.

    Raises:
        PrefoptError: The kind is unknown, ``path`` holds no judge of that kind, or vLLM is missing
            or cannot serve it.
    """
    if kind not in JUDGES:
        raise PrefoptError(f"judge.kind: found {kind!r}, expected {' or '.join(JUDGES)}")
    if engine == "vllm":
        return VLLM_JUDGES[kind](path, dtype=dtype, gpu_memory=gpu_memory)
    judge: Judge = JUDGES[kind].from_pretrained(path, dtype=dtype, device=device)
    return judge
