"""Proximal policy optimisation on tokens: rewards, advantages, clipped losses.

Sequences are rows of [sequences, width], padded on the right; ``mask`` is True on the real tokens,
a non-empty prefix of each row. What stands on the padding is never read. Dataset-reset PPO uses the
same functions: the forced prefix is made of real tokens, which the caller leaves out of the policy
loss and keeps in the value loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.objectives.policy_gradient import check_layout


def token_rewards(
    log_probs: Tensor, reference: Tensor, mask: Tensor, scores: Tensor, *, kl_coef: float
) -> Tensor:
    """``-kl_coef (lp_t - rf_t)`` on every token, plus the score of the answer on its last one.

    The reward of RLHF with PPO as in DR-PO (Chang et al., arXiv 2404.08495), whose forced tokens
    have a KL term too: generalised advantages look forward only, so that it reaches the value
    targets and the statistics of whitening but no advantage of a later token.

    Args:
        log_probs: [sequences, width], nats, of each token under the policy that drew it.
        reference: [sequences, width], likewise under the frozen reference.
        mask: [sequences, width], bool, real tokens.
        scores: [sequences], reward of each answer as a whole.
        kl_coef: Weight of the log-ratio, >= 0, per nat.

    Returns:
        [sequences, width], constants (no gradient); 0 on padding.

    Raises:
        PrefoptError: Shapes that do not fit, a mask that is no prefix, ``kl_coef`` below 0.

    Examples:
        >>> import torch
        >>> log_probs = torch.tensor([[-1.0, -2.0, 0.0]])
        >>> reference = torch.tensor([[-1.2, -2.4, 0.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> token_rewards(log_probs, reference, mask, torch.tensor([1.0]), kl_coef=0.05)
        tensor([[-0.0100,  0.9800,  0.0000]])
    """
    if not kl_coef >= 0:
        raise PrefoptError(f"ppo: found kl_coef={kl_coef}, expected a value of 0 or above")
    check_layout("sequences, width", log_probs=log_probs, reference=reference)
    _check_prefix(mask, log_probs)
    penalty = -kl_coef * (log_probs - reference).detach()
    return _masked(penalty, mask) + _at_last_token(scores.to(penalty), mask)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that the critic regresses on.

    Schulman et al., arXiv 1506.02438, Eq. 16: ``A_t = delta_t + gamma lam A_{t+1}`` with
    ``delta_t = r_t + gamma V_{t+1} - V_t``; an answer ends after its last real token, where the
    value is 0. ``returns = A + V``: with lam = 1 the discounted rewards to come, with lam = 0
    one-step targets ``r_t + gamma V_{t+1}``.

    Args:
        rewards: [sequences, width].
        values: [sequences, width], the critic's estimate **before** each token, of the rewards
            from this token on.
        mask: [sequences, width], bool, real tokens.
        gamma: Discount of a token, in [0, 1].
        lam: Trade of bias (0) for variance (1).

    Returns:
        ``(advantages, returns)``, [sequences, width] each, constants; 0 on padding.

    Raises:
        PrefoptError: Shapes that differ, a mask that is no prefix, a number outside [0, 1].

    Examples:
        >>> import torch
        >>> rewards, values = torch.tensor([[-0.01, -0.02, 1.0]]), torch.tensor([[0.2, 0.3, 0.4]])
        >>> gae(rewards, values, torch.ones(1, 3, dtype=torch.bool))
        (tensor([[0.7075, 0.6500, 0.6000]]), tensor([[0.9075, 0.9500, 1.0000]]))
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise PrefoptError(f"ppo: found {name}={number}, expected a value in [0, 1]")
    check_layout("sequences, width", rewards=rewards, values=values)
    _check_prefix(mask, values)
    # Zeros on padding make the value after the last token 0 and every advantage beyond it 0.
    rewards, values = _masked(rewards.detach(), mask), _masked(values.detach(), mask)
    deltas = rewards + gamma * _next(values) - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Values with variance 1 over the mask, and mean 0 unless the mean is kept.

    ``(x - mean) / sqrt(var + 1e-8)`` with the population variance, as the code of DR-PO (Chang
    et al., arXiv 2404.08495) does for advantages; ``shift_mean=False`` adds the mean back, as it
    does for rewards; where answers differ in length, that makes a reward of length. The statistics
    are those of the entries given.

    Args:
        values: Any shape.
        mask: The same shape, bool, entries to count.
        shift_mean: Whether the result has mean 0; else the mean of the values stays.

    Returns:
        The shape of ``values``; 0 outside the mask.

    Raises:
        PrefoptError: Shapes that differ, a mask that is not bool.

    Examples:
        >>> import torch
        >>> whiten(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool))
        tensor([-1.3416, -0.4472,  0.4472,  1.3416])
    """
    _check_mask(mask, values)
    counted = values[mask]
    mean = counted.mean()
    whitened = (values - mean) * torch.rsqrt(_variance(counted) + 1e-8)
    return _masked(whitened if shift_mean else whitened + mean, mask)


def ppo_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip: float
) -> Tensor:
    """One loss per token, ``max(-A r, -A clip(r, 1 - clip, 1 + clip))``.

    Minus the clipped surrogate of Schulman et al., arXiv 1707.06347, Eq. 7;
    ``r = exp(lp - old)``. No gradient comes from a token whose ratio has left the interval in the
    direction its advantage asks for.

    Args:
        log_probs: [tokens], nats, under the policy.
        old_log_probs: [tokens], likewise under the policy that drew the tokens; constants.
        advantages: [tokens]; constants.
        clip: Half width of the interval, > 0.

    Returns:
        [tokens].

    Raises:
        PrefoptError: Shapes that differ, ``clip`` not above 0.

    Examples:
        >>> import torch
        >>> log_probs = torch.tensor([1.5, 0.5]).log()
        >>> ppo_policy_loss(log_probs, torch.zeros(2), torch.ones(2), clip=0.2)
        tensor([-1.2000, -0.5000])
    """
    _check_clip(clip)
    check_layout("tokens", log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    ratio = (log_probs - old_log_probs.detach()).exp()
    weight = -advantages.detach()
    return torch.maximum(weight * ratio, weight * ratio.clamp(1 - clip, 1 + clip))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float
) -> Tensor:
    """One loss per token, ``max((v - R)^2, (v' - R)^2) / 2``, v' within ``clip`` of the old value.

    From implementations of PPO, DR-PO's among them (Chang et al., arXiv 2404.08495), not from its
    paper. No gradient comes from a value that has moved further than ``clip`` towards its return.

    Args:
        values: [tokens].
        old_values: [tokens], when the rollouts were made; constants.
        returns: [tokens]; constants.
        clip: How far a value may move, > 0, in the unit of the rewards.

    Returns:
        [tokens].

    Raises:
        PrefoptError: Shapes that differ, ``clip`` not above 0.

    Examples:
        >>> import torch
        >>> values, old, returns = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> clipped_value_loss(values, old, returns, clip=0.2)  # (0.2 - 1)^2 / 2
        tensor([0.3200])
    """
    _check_clip(clip)
    check_layout("tokens", values=values, old_values=old_values, returns=returns)
    old, target = old_values.detach(), returns.detach()
    clipped = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - target) ** 2, (clipped - target) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """``1 - var(returns - values) / var(returns)`` over the mask; 0 is a constant critic's.

    Args:
        values: Any shape, the critic's estimates.
        returns: The same shape, what they should have been.
        mask: The same shape, bool, entries to count.

    Returns:
        At most 1, that of a perfect critic; nan where all returns are equal, so that there is
        nothing to explain, or none is counted.

    Raises:
        PrefoptError: Shapes that differ, a mask that is not bool.

    Examples:
        >>> import torch
        >>> values, returns = torch.tensor([0.5, 1.5]), torch.tensor([0.0, 2.0])
        >>> explained_variance(values, returns, torch.ones(2, dtype=torch.bool))
        0.75
    """
    _check_mask(mask, values)
    _check_mask(mask, returns)
    # float64 keeps the variance of equal float32 returns at exactly 0.
    seen, wanted = values.detach()[mask].double(), returns.detach()[mask].double()
    total = _variance(wanted).item()
    if not total > 0:
        return math.nan
    return 1 - _variance(wanted - seen).item() / total


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """Zeros outside the mask, even where the values are not finite."""
    return torch.where(mask, values, torch.zeros_like(values))


def _variance(values: Tensor) -> Tensor:
    """Of the population: the sum of squares over n, not n - 1."""
    return ((values - values.mean()) ** 2).mean()


def _next(values: Tensor) -> Tensor:
    """The value of the next position, 0 after the last."""
    return torch.nn.functional.pad(values[:, 1:], (0, 1))


def _at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """[sequences, width]: each row's score at its last real token, 0 elsewhere."""
    if scores.shape != mask.shape[:1]:
        raise PrefoptError(
            f"scores: found shape {list(scores.shape)}, expected [{mask.shape[0]}]; give one value "
            "per sequence"
        )
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return _masked(scores[:, None].expand_as(mask), last)


def _check_mask(mask: Tensor, values: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise PrefoptError(f"mask: found {mask.dtype}, expected torch.bool; compare it with 0")
    if mask.shape != values.shape:
        raise PrefoptError(
            f"mask: found shape {list(mask.shape)}, expected {list(values.shape)} like the values"
        )


def _check_prefix(mask: Tensor, values: Tensor) -> None:
    _check_mask(mask, values)
    if not bool(mask[:, :1].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise PrefoptError(
            "mask: found a row that is not real tokens, then padding, expected at least one token "
            "and all padding on the right; pad on the right"
        )


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise PrefoptError(f"ppo: found clip={clip}, expected a value above 0")
