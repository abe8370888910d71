"""The policy trainers; adding one is one file, one recipe and one row in this table."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.inpo import INPOConfig, INPOTrainer
from prefopt.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from prefopt.trainers.sft import SFTConfig, SFTTrainer

# name in a recipe -> (config, trainer)
TRAINERS: dict[str, tuple[type[Any], type[Trainer]]] = {
    "sft": (SFTConfig, SFTTrainer),
    "dpo": (DPOConfig, DPOTrainer),
    "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer),
    "inpo": (INPOConfig, INPOTrainer),
}

__all__ = [
    "TRAINERS",
    "DPOConfig",
    "DPOTrainer",
    "INPOConfig",
    "INPOTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "SFTConfig",
    "SFTTrainer",
]
