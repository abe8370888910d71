"""Preference losses as pure functions of tensors: no model, no I/O, no state."""

from __future__ import annotations

from prefopt.objectives.inpo import inpo_loss
from prefopt.objectives.pair import (
    HARD_LABELS_ONLY,
    PAIR_LOSSES,
    Pairs,
    needs_reference,
    pair_loss,
)
from prefopt.objectives.reward import bradley_terry_loss

__all__ = [
    "HARD_LABELS_ONLY",
    "PAIR_LOSSES",
    "Pairs",
    "bradley_terry_loss",
    "inpo_loss",
    "needs_reference",
    "pair_loss",
]
