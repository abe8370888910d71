"""PEFT's adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def sets_in_order(model: nn.Module) -> Iterator[None]:
    """Has the configurations of a model's adapters, if it has any, written the same each time.

    PEFT keeps names, those of the target modules for one, in sets and writes them in their order,
    which Python chooses anew for each process.
    """
    sets = [
        (config, name, value)
        for config in getattr(model, "peft_config", {}).values()
        for name, value in vars(config).items()
        if isinstance(value, set)
    ]
    for config, name, value in sets:
        setattr(config, name, sorted(value))
    try:
        yield
    finally:
        for config, name, value in sets:
            setattr(config, name, value)
