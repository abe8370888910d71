"""The policy trainers; adding one is one file, one recipe and one row in this table."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.drpo import DRPOConfig, DRPOTrainer
from prefopt.trainers.hypo import HyPOConfig, HyPOTrainer
from prefopt.trainers.inpo import INPOConfig, INPOTrainer
from prefopt.trainers.nash_mp import NashMPConfig, NashMPTrainer
from prefopt.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from prefopt.trainers.ppo import PPOConfig, PPOTrainer

if TYPE_CHECKING:
    from prefopt.trainers.sft import SFTConfig, SFTTrainer

    TRAINERS: dict[str, tuple[type[Any], type[Trainer]]]

__all__ = [
    "TRAINERS",
    "DPOConfig",
    "DPOTrainer",
    "DRPOConfig",
    "DRPOTrainer",
    "HyPOConfig",
    "HyPOTrainer",
    "INPOConfig",
    "INPOTrainer",
    "NashMPConfig",
    "NashMPTrainer",
    "OnlineDPOConfig",
    "OnlineDPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "SFTConfig",
    "SFTTrainer",
]


@cache
def _trainers() -> dict[str, tuple[type[Any], type[Trainer]]]:
    from prefopt.trainers.sft import SFTConfig, SFTTrainer

    # name in a recipe -> (config, trainer)
    return {
        "sft": (SFTConfig, SFTTrainer),
        "dpo": (DPOConfig, DPOTrainer),
        "online_dpo": (OnlineDPOConfig, OnlineDPOTrainer),
        "hypo": (HyPOConfig, HyPOTrainer),
        "inpo": (INPOConfig, INPOTrainer),
        "nash_mp": (NashMPConfig, NashMPTrainer),
        "drpo": (DRPOConfig, DRPOTrainer),
        "ppo": (PPOConfig, PPOTrainer),
    }


def __getattr__(name: str) -> Any:
    """SFT stands on TRL, which the other trainers do without: it is imported when asked for."""
    if name == "TRAINERS":
        return _trainers()
    if name in ("SFTConfig", "SFTTrainer"):
        from prefopt.trainers import sft

        return getattr(sft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
