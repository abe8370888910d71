"""PEFT's adapters."""

from __future__ import annotations

from torch import nn


def order_target_modules(model: nn.Module) -> None:
    """Has a model's adapters, if it has any, stored with the same configuration by every process.

    PEFT keeps the names of target modules in a set and writes them in its order, which Python
    chooses anew for each process.
    """
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
