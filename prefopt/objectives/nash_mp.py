"""The policy gradient of Nash-MP: self-play held near a reference and a slowly moving target."""

from __future__ import annotations

from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.objectives.pair import check_probability
from prefopt.objectives.policy_gradient import (
    check_layout,
    mean_of_others,
    score_function_loss,
)


def nash_mp_loss(
    log_probs: Tensor,
    reference: Tensor,
    target: Tensor | None,
    win_rates: Tensor,
    *,
    beta: float,
    prox: float,
) -> Tensor:
    """One loss per prompt whose gradient ascends a proximal step of the preference game.

    The step of Nash mirror prox (Tiapkin et al., arXiv 2505.19731) maximises
    ``P(pi > q) - beta KL(pi || reference) - prox KL(pi || target)`` against the opponent q. In
    expectation the loss has minus its gradient, with softmax logits
    ``pi (r - <pi, r>)`` for ``r = P(y > q) - beta log(pi/reference) - prox log(pi/target)``.
    Per prompt, with ``k_i = sg(-beta (lp_i - rf_i) - prox (lp_i - lt_i))``:

    ``adv_i = (win_rates_i - 1/2) + k_i - mean of the other k``,
    ``loss = -(1/n) sum_i sg(adv_i) lp_i``.

    The baseline of the win rates is 1/2, the value of self-play. A leave-one-out baseline on them
    would double the preference part at n = 2: one sample's win rate is 1 minus the other's.

    This estimator, and an average of past policies as the target, are this project's choices; only
    the step itself is taken from the paper. ``prox = 0`` is plain self-play: its expected gradient
    is ``beta/4`` times that of IPO on pairs of the policy's own samples.

    Args:
        log_probs: [prompts, n], n >= 2, nats, summed over completion tokens including EOS, of
            completions drawn independently from the current policy at the temperature of these
            log-probs.
        reference: [prompts, n], likewise under the frozen reference.
        target: [prompts, n], likewise under the centre of the proximal step; None if ``prox`` is 0.
        win_rates: [prompts, n], in [0, 1]: the mean over opponents of the probability that this
            completion is the better one. The opponents are the other samples (self-play) or
            samples of another policy, never the completion itself.
        beta: Weight of the KL divergence to the reference, >= 0, per nat.
        prox: Weight of that to the target, >= 0; ``beta / eta`` for a step eta.

    Returns:
        [prompts]; its gradient means something, its value does not.

    Raises:
        PrefoptError: ``beta`` or ``prox`` below 0; ``prox`` above 0 without a target; shapes that
            differ; n < 2; win rates outside [0, 1].

    Examples:
        >>> import torch
        >>> log_probs, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.5]])
        >>> win_rates = torch.tensor([[0.8, 0.2]])  # advantages 0.3 - 0.15 and its opposite
        >>> nash_mp_loss(log_probs, reference, None, win_rates, beta=0.1, prox=0.0)
        tensor([-0.1500])
    """
    for name, weight in (("beta", beta), ("prox", prox)):
        if not weight >= 0:
            raise PrefoptError(f"nash_mp: found {name}={weight}, expected a value of 0 or above")
    if prox > 0 and target is None:
        raise PrefoptError(
            f"nash_mp: found prox={prox} and no target, expected the target's log-probs; pass them "
            "or set prox=0"
        )
    check_layout(
        "prompts, n", log_probs=log_probs, reference=reference, target=target, win_rates=win_rates
    )
    check_probability("win_rates", win_rates, log_probs.dtype)
    penalty = -beta * (log_probs - reference).detach()
    if prox > 0 and target is not None:
        penalty = penalty - prox * (log_probs - target).detach()
    advantages = (win_rates.to(log_probs.dtype) - 0.5) + (penalty - mean_of_others(penalty))
    return score_function_loss(log_probs, advantages)
