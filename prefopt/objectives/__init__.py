"""Preference losses as pure functions of tensors: no model, no I/O, no state."""

from __future__ import annotations

from prefopt.objectives.hypo import reverse_kl_loss
from prefopt.objectives.inpo import inpo_loss
from prefopt.objectives.nash_mp import nash_mp_loss
from prefopt.objectives.pair import (
    HARD_LABELS_ONLY,
    PAIR_LOSSES,
    Pairs,
    needs_reference,
    pair_loss,
)
from prefopt.objectives.policy_gradient import mean_of_others, score_function_loss
from prefopt.objectives.ppo import (
    clipped_value_loss,
    explained_variance,
    gae,
    ppo_policy_loss,
    token_rewards,
    whiten,
)
from prefopt.objectives.reward import bradley_terry_loss

__all__ = [
    "HARD_LABELS_ONLY",
    "PAIR_LOSSES",
    "Pairs",
    "bradley_terry_loss",
    "clipped_value_loss",
    "explained_variance",
    "gae",
    "inpo_loss",
    "mean_of_others",
    "nash_mp_loss",
    "needs_reference",
    "pair_loss",
    "ppo_policy_loss",
    "reverse_kl_loss",
    "score_function_loss",
    "token_rewards",
    "whiten",
]
