"""Preference learning on matrix games, exactly: what the trainers of language models approximate.

Policies are natural log-probabilities everywhere, float64, shape [actions].
"""

from prefopt.games.algorithms import (
    egpo_step,
    inpo_step,
    mixture,
    mpo_step,
    nash_md_step,
    nash_mp_ema_step,
    nash_mp_step,
    npg_step,
    optimistic_md_step,
    policy_gradient,
    prox_step,
    self_play_step,
)
from prefopt.games.game import (
    Game,
    best_response,
    equilibrium,
    exploitability,
    kl,
    log_normalise,
    nash,
    nash_exploitability,
    value,
    win_rates,
)
from prefopt.games.trajectory import ALGORITHMS, ALIASES, Algorithm, Trajectory, play, policies

__all__ = [
    "ALGORITHMS",
    "ALIASES",
    "Algorithm",
    "Game",
    "Trajectory",
    "best_response",
    "egpo_step",
    "equilibrium",
    "exploitability",
    "inpo_step",
    "kl",
    "log_normalise",
    "mixture",
    "mpo_step",
    "nash",
    "nash_exploitability",
    "nash_md_step",
    "nash_mp_ema_step",
    "nash_mp_step",
    "npg_step",
    "optimistic_md_step",
    "play",
    "policies",
    "policy_gradient",
    "prox_step",
    "self_play_step",
    "value",
    "win_rates",
]
