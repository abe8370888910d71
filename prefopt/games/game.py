"""The KL-regularised symmetric game of preference learning, its equilibrium and its distances.

Two players pick an action each; ``payoff[y, z]`` is the probability that y beats z. Both pay
``beta`` for every nat of divergence from the reference mu:

    J(p, q) = p' P q - beta KL(p || mu) + beta KL(q || mu)

``J(p, p) = 1/2`` always. The best response to q is ``mu exp(P q / beta)``, normalised, and the
unique symmetric equilibrium p* is the policy that is the best response to itself.

Policies are natural log-probabilities throughout, float64, shape [actions].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prefopt.errors import PrefoptError

Array: TypeAlias = NDArray[np.float64]

TOLERANCE = 1e-9
CERTIFICATE = 1e-12
SMALLEST_KL = 1e-32
SMALLEST_STEP = 1e-14
MAX_NEWTON_STEPS = 500
NASH_BETA = 1e-5
NASH_CERTIFICATE = 1e-9
MAX_NASH_ROUNDS = 100
# Wide enough for any use; within it 1/beta, beta^2 and their products stay inside float64.
MIN_BETA, MAX_BETA = 1e-12, 1e12


@dataclass(frozen=True, eq=False)
class Game:
    """A symmetric preference game with its reference policy.

    Args:
        payoff: P, shape [actions, actions], entries in [0, 1], ``P + P^T = 1``.
        reference: mu, shape [actions], positive, summing to 1.
        beta: Weight of the divergence from the reference, in [1e-12, 1e12].

    Raises:
        PrefoptError: If one of these does not hold; indices in the message count from 0.
    """

    payoff: Array
    reference: Array
    beta: float

    def __init__(self, payoff: ArrayLike, reference: ArrayLike, beta: float) -> None:
        object.__setattr__(self, "payoff", _checked_payoff(payoff))
        object.__setattr__(self, "reference", _checked_reference(reference, len(self.payoff)))
        if not MIN_BETA <= beta <= MAX_BETA:
            raise PrefoptError(
                f"beta: found {beta}, expected a number in [{MIN_BETA:g}, {MAX_BETA:g}]"
            )
        object.__setattr__(self, "beta", float(beta))

    @property
    def log_reference(self) -> Array:
        """``log mu``, shape [actions]."""
        return np.log(self.reference)


def log_normalise(logits: Array) -> Array:
    """Log-probabilities of the policy with these logits, shape [actions]."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def win_rates(game: Game, log_policy: Array) -> Array:
    """Probability that each action beats a draw from the policy, ``P p``: one query; [actions]."""
    return game.payoff @ np.exp(log_policy)


def value(game: Game, log_p: Array, log_q: Array) -> float:
    """``J(p, q)``: what p earns against q; the game is symmetric, so ``J(p, q) + J(q, p) = 1``."""
    penalty = kl(log_p, game.log_reference) - kl(log_q, game.log_reference)
    return float(np.exp(log_p) @ win_rates(game, log_q)) - game.beta * penalty


def best_response(game: Game, log_policy: Array) -> Array:
    """The maximiser of ``J(., policy)``, in closed form ``mu exp(P p / beta)``; [actions]."""
    return _best_response(game.payoff, game.log_reference, game.beta, log_policy)


def kl(log_p: Array, log_q: Array) -> float:
    """``KL(p || q)`` in nats, without cancellation: never negative, exact down to about 1e-32.

    Sums ``q - p - p log(q / p)``, of which no term is negative; an action with p = 0 adds q.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(over="ignore", invalid="ignore"):
        log_ratio = log_q - log_p
        near = p * (np.expm1(log_ratio) - log_ratio)
        far = q - p - p * log_ratio
    return float(np.where(p > 0, np.where(log_ratio < 1, near, far), q).sum())


def exploitability(game: Game, log_policy: Array) -> float:
    """``max_q J(q, p) - 1/2``: what the best opponent gains; 0 at the equilibrium only.

    Computed as ``beta KL(p || best response)``, the same number: against a fixed opponent J falls
    short of its maximum by beta times the divergence from the maximiser. It bounds the distance to
    the equilibrium: ``beta KL(p || p*) <= exploitability(p)``.
    """
    return game.beta * kl(log_policy, best_response(game, log_policy))


def nash_exploitability(game: Game, log_policy: Array) -> float:
    """``max P p - 1/2``: what the best opponent gains where nobody pays for divergence."""
    return float(win_rates(game, log_policy).max()) - 0.5


def equilibrium(game: Game) -> Array:
    """The regularised equilibrium p*, shape [actions].

    Damped Newton steps on ``log p = log mu + P p / beta + const`` while beta halves from 1 to its
    value. The Jacobian is the identity minus an antisymmetric matrix times a covariance; the
    eigenvalues of that product are imaginary, so it is never singular and each step shrinks the
    residual. Since ``beta KL(p || p*)`` is at most the exploitability, that certifies the result.

    Raises:
        PrefoptError: If the exploitability stays above 1e-12 (beta far below 1e-5).
    """
    log_policy = _equilibrium(game.payoff, game.log_reference, game.beta)
    gap = exploitability(game, log_policy)
    if not gap <= CERTIFICATE:
        raise PrefoptError(
            f"equilibrium: found exploitability {gap:.1e} at beta {game.beta:g}, expected at most "
            f"{CERTIFICATE:g}; use a larger beta"
        )
    return log_policy


def nash(game: Game) -> Array:
    """A Nash equilibrium of the payoff alone, close to the reference, shape [actions].

    Proximal points: the equilibrium at a small beta becomes the reference of the next. Where there
    are several Nash equilibria this finds one of them.

    Raises:
        PrefoptError: If the unregularised exploitability stays above 1e-9.
    """
    log_policy = game.log_reference
    for _ in range(MAX_NASH_ROUNDS):
        log_policy = _equilibrium(game.payoff, log_policy, NASH_BETA)
        if nash_exploitability(game, log_policy) <= CERTIFICATE:
            return log_policy
    gap = nash_exploitability(game, log_policy)
    if gap > NASH_CERTIFICATE:
        raise PrefoptError(
            f"Nash equilibrium: found exploitability {gap:.1e} after {MAX_NASH_ROUNDS} proximal "
            f"points, expected at most {NASH_CERTIFICATE:g}; the payoff is too degenerate"
        )
    return log_policy


def _best_response(payoff: Array, log_reference: Array, beta: float, log_policy: Array) -> Array:
    return log_normalise(log_reference + payoff @ np.exp(log_policy) / beta)


def _equilibrium(payoff: Array, log_reference: Array, beta: float) -> Array:
    logits, current = log_reference, max(beta, 1.0)
    while current > beta:
        logits = _newton(payoff, log_reference, current, logits, enough=1e-3)
        current = max(beta, current / 2)
    return log_normalise(_newton(payoff, log_reference, beta, logits, enough=SMALLEST_KL))


def _newton(
    payoff: Array, log_reference: Array, beta: float, logits: Array, enough: float
) -> Array:
    """Damped Newton steps until ``KL(p || best response)`` is `enough` or nothing is gained."""
    centred = payoff - 0.5

    def residual(z: Array) -> tuple[Array, float]:
        difference = z - log_reference - centred @ np.exp(log_normalise(z)) / beta
        return difference, float(np.linalg.norm(difference))

    difference, norm = residual(logits)
    for _ in range(MAX_NEWTON_STEPS):
        log_policy = log_normalise(logits)
        if kl(log_policy, log_normalise(logits - difference)) <= enough:
            break
        p = np.exp(log_policy)
        # centred payoff times the covariance diag(p) - p p'
        weighted = centred * p
        weighted -= np.outer(weighted.sum(1), p)
        direction = np.linalg.solve(np.eye(len(p)) - weighted / beta, -difference)
        step = 1.0
        while step > SMALLEST_STEP:
            proposal = logits + step * direction
            difference, proposed = residual(proposal)
            if proposed < norm * (1 - 1e-4 * step):
                break
            step /= 2
        else:
            break
        logits, norm = proposal, proposed
    return logits


def _checked_payoff(payoff: ArrayLike) -> Array:
    matrix = _frozen("payoff", payoff)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise PrefoptError(
            f"payoff: found shape {matrix.shape}, expected a square matrix [actions, actions]"
        )
    inside = (matrix >= 0) & (matrix <= 1)
    if not inside.all():
        row, column = np.argwhere(~inside)[0]
        raise PrefoptError(
            f"payoff[{row}][{column}]: found {matrix[row, column]}, expected the probability that "
            f"action {row} beats action {column}, in [0, 1]"
        )
    total = matrix + matrix.T
    wrong = np.abs(total - 1) > TOLERANCE
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise PrefoptError(
            f"payoff[{row}][{column}] + payoff[{column}][{row}]: found {matrix[row, column]} + "
            f"{matrix[column, row]} = {total[row, column]:.10g}, expected 1 (within {TOLERANCE:g}; "
            "1/2 on the diagonal); the average (P + 1 - P^T) / 2 of both orders satisfies it"
        )
    return matrix


def _checked_reference(reference: ArrayLike, actions: int) -> Array:
    vector = _frozen("reference", reference)
    if vector.shape != (actions,):
        raise PrefoptError(
            f"reference: found shape {vector.shape}, expected ({actions},): one probability for "
            "each action of the payoff"
        )
    positive = (vector > 0) & np.isfinite(vector)
    if not positive.all():
        index = int(np.argmin(positive))
        raise PrefoptError(
            f"reference[{index}]: found {vector[index]}, expected a positive probability; an "
            "action of probability 0 can never be played: leave it out of reference and payoff"
        )
    if abs(vector.sum() - 1) > TOLERANCE:
        raise PrefoptError(
            f"reference: found entries {np.array2string(vector, threshold=6)} that sum to "
            f"{vector.sum():.10g}, expected 1 (within {TOLERANCE:g}); divide them by their sum"
        )
    return vector


def _frozen(name: str, values: ArrayLike) -> Array:
    """A read-only copy in float64."""
    try:
        array: Any = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise PrefoptError(
            f"{name}: expected float64 numbers in rows of one length; numpy says: {error}"
        ) from error
    array.flags.writeable = False
    return array
