"""Algorithms played from the reference, with their distances from equilibrium by queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from itertools import islice
from numbers import Integral
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefopt.errors import PrefoptError
from prefopt.games.algorithms import (
    egpo_step,
    inpo_step,
    mpo_step,
    nash_md_step,
    nash_mp_ema_step,
    nash_mp_step,
    npg_step,
    optimistic_md_step,
    self_play_step,
)
from prefopt.games.game import (
    Array,
    Game,
    equilibrium,
    exploitability,
    kl,
    log_normalise,
    nash,
    nash_exploitability,
    win_rates,
)

# More would take hours and memory beyond bounds: every policy is measured.
MAX_STEPS = 10**8


class Algorithm(NamedTuple):
    """How an algorithm is played.

    Attributes:
        policies: Called with a game and the settings: the log-policies from the reference on.
        queries: Evaluations of the payoff against a policy, per step.
        defaults: Each setting and its default as a function of beta.
        regularised: False if it seeks the Nash equilibrium of the payoff alone.
    """

    policies: Callable[..., Iterator[Array]]
    queries: int
    defaults: Mapping[str, Callable[[float], float]]
    regularised: bool = True


class Trajectory(NamedTuple):
    """A run: arrays of shape [steps + 1], the reference first; the last policy, [actions].

    ``kl`` is KL(equilibrium || policy). For an algorithm that is not regularised, equilibrium and
    exploitability are those of the payoff alone.
    """

    log_policy: Array
    queries: NDArray[np.int64]
    kl: Array
    exploitability: Array


def policies(game: Game, algorithm: str, **settings: float) -> Iterator[Array]:
    """The endless sequence of an algorithm's log-policies, each of shape [actions].

    Args:
        game: The game; its reference is the first policy.
        algorithm: A name of ``ALGORITHMS`` or ``ALIASES``.
        settings: The algorithm's own, over its defaults.

    Raises:
        PrefoptError: If the algorithm is unknown or does not read a setting.
    """
    chosen = ALGORITHMS[algorithm_name(algorithm)]
    for setting in settings:
        if setting not in chosen.defaults:
            reads = ", ".join(chosen.defaults) or "none"
            raise PrefoptError(
                f"{setting}: {algorithm!r} does not use it (its settings: {reads}); leave it out"
            )
    defaults = {name: default(game.beta) for name, default in chosen.defaults.items()}
    return chosen.policies(game, **defaults | settings)


def play(game: Game, algorithm: str, steps: int, **settings: float) -> Trajectory:
    """Plays an algorithm and measures every policy.

    Args:
        game: The game; the policy starts at its reference.
        algorithm: A name of ``ALGORITHMS`` or ``ALIASES``.
        steps: Number of steps, from 0 to 1e8.
        settings: The algorithm's own, over its defaults.

    Raises:
        PrefoptError: If the algorithm, a setting or a value is refused, no equilibrium is found or
            a policy is not finite.
    """
    if not isinstance(steps, Integral) or not 0 <= steps <= MAX_STEPS:
        raise PrefoptError(f"steps: found {steps}, expected a whole number from 0 to {MAX_STEPS:,}")
    chosen = ALGORITHMS[algorithm_name(algorithm)]
    sequence = policies(game, algorithm, **settings)
    target = equilibrium(game) if chosen.regularised else nash(game)
    gap = exploitability if chosen.regularised else nash_exploitability
    measured = []
    # what overflows is refused by name, without numpy's warnings
    with np.errstate(over="ignore", invalid="ignore"):
        for step, log_policy in enumerate(islice(sequence, steps + 1)):
            measured.append((kl(target, log_policy), gap(game, log_policy)))
            if not (np.isfinite(log_policy).all() and np.isfinite(measured[-1]).all()):
                raise PrefoptError(
                    f"{algorithm}: found a policy that is not finite after step {step}, expected "
                    "log-probabilities; lower lr or, where beta / eta is huge, raise eta"
                )
    queries = chosen.queries * np.arange(steps + 1)
    return Trajectory(log_policy, queries, *np.array(measured).T)


def algorithm_name(name: str) -> str:
    """The key in ``ALGORITHMS`` for a name or an alias.

    Raises:
        PrefoptError: If there is none.
    """
    name = ALIASES.get(name, name)
    if name not in ALGORITHMS:
        close = get_close_matches(name, [*ALGORITHMS, *ALIASES], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PrefoptError(
            f"algorithm: found {name!r}, expected one of {', '.join(ALGORITHMS)}{hint}"
        )
    return name


def _repeat(step: Callable[..., Array], game: Game, **settings: float) -> Iterator[Array]:
    policy = game.log_reference
    while True:
        yield policy
        policy = step(game, policy, **settings)


def _nash_md_decreasing(game: Game) -> Iterator[Array]:
    policy, t = game.log_reference, 1
    while True:
        yield policy
        policy = nash_md_step(game, policy, 2 / (game.beta * (t + 2)))
        t += 1


def _optimistic_md(game: Game, eta: float) -> Iterator[Array]:
    previous = policy = game.log_reference
    while True:
        yield policy
        previous, policy = policy, optimistic_md_step(game, policy, previous, eta)


def _nash_mp_ema(game: Game, **settings: float) -> Iterator[Array]:
    logits = target = game.log_reference
    while True:
        yield log_normalise(logits)
        logits, target = nash_mp_ema_step(game, logits, target, **settings)


def _mpo(game: Game, eta: float, period: float) -> Iterator[Array]:
    if period < 1 or not float(period).is_integer():
        raise PrefoptError(f"period: found {period}, expected a whole number of steps, at least 1")
    policy, t = game.log_reference, 0
    while True:
        yield policy
        if t % period == 0:
            magnet = policy
        policy = mpo_step(game, policy, magnet, eta)
        t += 1


def _drpo_step(game: Game, log_policy: Array, eta: float) -> Array:
    return npg_step(log_policy, game.log_reference, win_rates(game, log_policy), eta, game.beta)


def _at_most_inverse(step: float) -> Callable[[float], float]:
    """A step size, lowered to 1/beta where beta is so large that it must be."""
    return lambda beta: min(step, 1 / beta)


def _stable_self_play(beta: float) -> float:
    """The self-play step of a proximal step with eta = 2 beta^2: slow and never seen to cycle."""
    return 2 * beta / (1 + 2 * beta**2)


def _twice(beta: float) -> float:
    return 2 * beta


def _constant(number: float) -> Callable[[float], float]:
    return lambda beta: number


ALGORITHMS: dict[str, Algorithm] = {
    "self_play": Algorithm(partial(_repeat, self_play_step), 1, {"eta": _stable_self_play}),
    "inpo": Algorithm(
        partial(_repeat, inpo_step), 1, {"eta": lambda beta: 1 / _stable_self_play(beta)}
    ),
    "nash_md": Algorithm(partial(_repeat, nash_md_step), 1, {"eta": _at_most_inverse(0.1)}),
    "nash_md_decreasing": Algorithm(_nash_md_decreasing, 1, {}),
    "optimistic_md": Algorithm(_optimistic_md, 1, {"eta": _at_most_inverse(0.5)}),
    "egpo": Algorithm(partial(_repeat, egpo_step), 2, {"eta": _at_most_inverse(1.0)}),
    "nash_mp": Algorithm(partial(_repeat, nash_mp_step), 2, {"eta": _twice}),
    "nash_mp_ema": Algorithm(
        _nash_mp_ema, 1, {"eta": _twice, "kappa": _constant(0.1), "lr": _constant(0.5)}
    ),
    "mpo": Algorithm(_mpo, 1, {"eta": _constant(1.0), "period": _constant(50)}, regularised=False),
    "drpo": Algorithm(partial(_repeat, _drpo_step), 1, {"eta": _twice}),
}

ALIASES: dict[str, str] = {"online_ipo": "self_play"}
