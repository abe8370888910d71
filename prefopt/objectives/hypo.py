"""The sampled half of HyPO: the reverse KL divergence on completions of the policy itself."""

from __future__ import annotations

from torch import Tensor

from prefopt.objectives.policy_gradient import (
    check_layout,
    mean_of_others,
    score_function_loss,
)


def reverse_kl_loss(log_probs: Tensor, reference: Tensor) -> Tensor:
    """One loss per prompt whose expected gradient is that of ``KL(policy || reference)``.

    HyPO (Song et al., arXiv 2406.01462) adds lambda times this divergence, on unlabelled samples
    of the policy, to the DPO loss on pairs. With ``kappa_i = sg(lp_i - rf_i)`` and ``b_i`` the mean
    of the other kappas of the prompt, the loss is ``(1/k) sum_i (kappa_i - b_i) lp_i``. Since
    ``E[grad lp] = 0``, ``grad KL = E[(kappa + 1) grad lp] = E[kappa grad lp]``.

    The value is not the divergence: log the mean of ``lp - rf`` for that. Differentiating that
    mean instead would give ``E[grad lp]``, zero in expectation: no regularisation at all.

    Args:
        log_probs: [prompts, k], k >= 2, nats, summed over completion tokens including EOS, of
            completions the current policy drew at the temperature of these log-probs, without
            top-k, top-p or repetition penalty.
        reference: [prompts, k], likewise under the frozen reference; a constant.

    Returns:
        [prompts]. With policy and reference equal on the samples, gradient and value are exactly
        0, not only in expectation.

    Raises:
        PrefoptError: Shapes differ or are not [prompts, k]; k < 2.

    Examples:
        >>> import torch
        >>> log_probs, reference = torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.5]])
        >>> reverse_kl_loss(log_probs, reference)  # (1.5 * -10 - 1.5 * -12) / 2
        tensor([1.5000])
    """
    check_layout("prompts, k", log_probs=log_probs, reference=reference)
    kappa = (log_probs - reference).detach()
    return score_function_loss(log_probs, mean_of_others(kappa) - kappa)
