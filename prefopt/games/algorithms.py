"""One exact step of each algorithm on a game: pure functions from log-policies to log-policies.

All of them are one kernel, ``mixture``: a geometric mixture of policies, tilted by a payoff. The
expectation over samples is taken exactly, and so is every argmin; what is left of an algorithm is
its update. ``P pi`` are the win rates against pi (one query), mu the reference, b beta.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prefopt.errors import PrefoptError
from prefopt.games.game import Array, Game, log_normalise, win_rates


def mixture(terms: Iterable[tuple[float, Array]], payoff: Array, scale: float) -> Array:
    """``normalise(sum_i w_i log p_i + scale * payoff)``.

    Args:
        terms: Pairs of a weight w_i and a log-policy log p_i, shape [actions].
        payoff: What tilts the mixture, shape [actions].
        scale: Its factor: a step size.
    """
    # a weight of 0 drops its term, also where the policy never plays an action (0 * -inf)
    return log_normalise(sum((w * log_p for w, log_p in terms if w), scale * payoff))


def self_play_step(game: Game, log_policy: Array, eta: float) -> Array:
    """Self-play mirror descent: ``pi^(1 - eta b) mu^(eta b) exp(eta P pi)``.

    The expected update of Online IPO, whose gradient is -4/b times the self-play policy gradient.

    Raises:
        PrefoptError: If eta is outside (0, 1/beta].
    """
    return _mirror_step(game, log_policy, win_rates(game, log_policy), eta)


def inpo_step(game: Game, log_policy: Array, eta: float) -> Array:
    """INPO (2407.00617): ``mu^(tau/eta) pi^(1 - tau/eta) exp(P pi / eta)``, tau = beta.

    The exact minimiser of INPO's regression. Its eta is an inverse step size: self-play's 1/eta.

    Raises:
        PrefoptError: If eta is below tau.
    """
    if not game.beta <= eta < np.inf:
        raise PrefoptError(f"eta: found {eta}, expected at least tau = beta = {game.beta} (INPO)")
    return self_play_step(game, log_policy, 1 / eta)


def nash_md_step(game: Game, log_policy: Array, eta: float) -> Array:
    """Nash-MD (2312.00886): ``m exp(eta P m)``, ``m = pi^(1 - eta b) mu^(eta b)`` normalised.

    The opponent is the mixture m, so a constant eta comes to rest beside p*.

    Raises:
        PrefoptError: If eta is outside (0, 1/beta].
    """
    anchored = _mirror_step(game, log_policy, np.zeros_like(log_policy), eta)
    return mixture([(1, anchored)], win_rates(game, anchored), eta)


def egpo_step(game: Game, log_policy: Array, eta: float) -> Array:
    """EGPO (2503.08942): a self-play step to find the opponent, then the step from pi itself.

    Raises:
        PrefoptError: If eta is outside (0, 1/beta].
    """
    half = self_play_step(game, log_policy, eta)
    return _mirror_step(game, log_policy, win_rates(game, half), eta)


def optimistic_md_step(game: Game, log_policy: Array, log_previous: Array, eta: float) -> Array:
    """Optimistic mirror descent: self-play with ``P (2 pi_t - pi_{t-1})`` for ``P pi_t``.

    One query, since the win rates against ``pi_{t-1}`` are known from the step before.

    Raises:
        PrefoptError: If eta is outside (0, 1/beta].
    """
    payoff = 2 * win_rates(game, log_policy) - win_rates(game, log_previous)
    return _mirror_step(game, log_policy, payoff, eta)


def prox_step(game: Game, log_centre: Array, log_opponent: Array, eta: float) -> Array:
    """Proximal step of Nash-MP (2505.19731, version 1).

    ``argmin (1/b) P(q > pi) + KL(pi || mu) + (1/eta) KL(pi || centre)`` for the opponent q:
    ``mu^(eta/(1+eta)) centre^(1/(1+eta)) exp(eta / (b (1+eta)) P q)``. Against the centre itself it
    is a self-play step of size ``eta / (b (1+eta))``.

    Raises:
        PrefoptError: If eta is not positive.
    """
    _check_positive(eta)
    keep = 1 / (1 + eta)
    terms = [(1 - keep, game.log_reference), (keep, log_centre)]
    return mixture(terms, win_rates(game, log_opponent), (1 - keep) / game.beta)


def nash_mp_step(game: Game, log_policy: Array, eta: float) -> Array:
    """Nash-MP (2505.19731, version 1): a proximal step for the opponent, then one against it.

    Both are centred at pi. With ``eta = 2 beta`` KL(p* || pi) falls by ``1 + 2 beta`` a step or
    faster. It is EGPO with step ``eta / (beta (1 + eta))``.

    Raises:
        PrefoptError: If eta is not positive.
    """
    half = prox_step(game, log_policy, log_policy, eta)
    return prox_step(game, log_policy, half, eta)


def npg_step(
    log_policy: Array, log_reference: Array, q_values: Array, eta: float, lam: float
) -> Array:
    """Natural policy gradient with KL weight lam, the theory behind DR-PO (2404.08495).

    ``mu^(eta lam/(1+eta lam)) pi^(1/(1+eta lam)) exp(eta/(1+eta lam) Q)``. In a game
    (algorithm ``drpo``) lam is beta and Q the win rates against the current policy: the expected
    reward of an action when the reward is winning against a draw of the policy.

    Raises:
        PrefoptError: If eta is not positive.
    """
    _check_positive(eta)
    keep = 1 / (1 + eta * lam)
    return mixture([(1 - keep, log_reference), (keep, log_policy)], q_values, eta * keep)


def mpo_step(game: Game, log_policy: Array, log_magnet: Array, eta: float) -> Array:
    """Magnetic mirror descent, MPO (2410.16714): ``[pi magnet^(eta b) exp(eta P pi)]^w``.

    The exponent w is ``1/(1 + eta b)``. Beta weighs the pull towards the magnet, not towards mu. A
    magnet that stands still leads to the equilibrium regularised towards it; one that is renewed
    now and then (``magnet := pi``) to the Nash equilibrium of the payoff alone.

    Raises:
        PrefoptError: If eta is not positive.
    """
    return npg_step(log_policy, log_magnet, win_rates(game, log_policy), eta, game.beta)


def policy_gradient(
    game: Game, log_policy: Array, log_opponent: Array, log_target: Array, prox: float
) -> Array:
    """Gradient in the logits of ``p' P q - b KL(p || mu) - prox KL(p || target)``, q fixed.

    ``p (r - p.r)`` with ``r = P q - 1/2 - b log(p / mu) - prox log(p / target)``; shape [actions].
    The half is a baseline, it changes nothing.
    """
    p = np.exp(log_policy)
    reward = win_rates(game, log_opponent) - 0.5
    reward -= game.beta * (log_policy - game.log_reference) + prox * (log_policy - log_target)
    return p * (reward - p @ reward)


def nash_mp_ema_step(
    game: Game, logits: Array, target: Array, eta: float, kappa: float, lr: float
) -> tuple[Array, Array]:
    """Approximate Nash-MP: one gradient step against itself, near a slowly moving target.

    ``logits += lr * actions * gradient``, where the gradient is that of self-play with a proximal
    term of weight ``b / eta`` towards the target; then ``target += kappa (logits - target)``.
    kappa = 1 is plain self-play, kappa = 0 freezes the target. The moving average is a choice of
    this project: a reconstruction, not the published practical method.

    Returns:
        Logits and the target's logits after the step, both of shape [actions].

    Raises:
        PrefoptError: If eta or lr is not positive or kappa is outside [0, 1].
    """
    _check_positive(eta)
    _check_positive(lr, "lr")
    if not 0 <= kappa <= 1:
        raise PrefoptError(f"kappa: found {kappa}, expected a rate in [0, 1]")
    log_policy, log_target = log_normalise(logits), log_normalise(target)
    gradient = policy_gradient(game, log_policy, log_policy, log_target, game.beta / eta)
    logits = logits + lr * len(logits) * gradient
    return logits, target + kappa * (logits - target)


def _mirror_step(game: Game, log_policy: Array, payoff: Array, eta: float) -> Array:
    """``pi^(1 - eta b) mu^(eta b) exp(eta payoff)``."""
    pull = eta * game.beta
    # 1/beta times beta may round to just above 1
    if not 0 < pull <= 1 + 1e-12:
        raise PrefoptError(
            f"eta: found {eta}, expected a step size above 0 and up to 1/beta = {1 / game.beta:g}"
        )
    terms = [(max(1 - pull, 0.0), log_policy), (pull, game.log_reference)]
    return mixture(terms, payoff, eta)


def _check_positive(number: float, name: str = "eta") -> None:
    if not 0 < number < np.inf:
        raise PrefoptError(f"{name}: found {number}, expected a positive number")
