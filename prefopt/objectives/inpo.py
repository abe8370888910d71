"""The loss of INPO: regression on preferences between samples of the current iterate."""

from __future__ import annotations

from torch import Tensor

from prefopt.errors import PrefoptError
from prefopt.objectives.pair import check_probability, check_shapes, expected_loss


def inpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    previous_chosen: Tensor,
    previous_rejected: Tensor,
    *,
    eta: float,
    tau: float,
    p_chosen: Tensor | None = None,
) -> Tensor:
    """One loss per pair, ``(h - 1/(2 eta))^2``, differentiable in the policy's log-probs.

    Iterative Nash policy optimisation (Zhang et al., arXiv 2407.00617). With ``lp``, ``rf`` and
    ``lp_t`` the log-probs under the policy, the frozen reference and the iterate that drew the
    pair, ``h = lp(w) - lp(l) - tau/eta (rf(w) - rf(l)) - (1 - tau/eta) (lp_t(w) - lp_t(l))``.
    Its minimiser over pairs drawn independently from the iterate is the next iterate of mirror
    descent, proportional to ``reference^(tau/eta) previous^(1 - tau/eta) exp(P / eta)``, where P
    is the win rate against the iterate.

    With soft labels the loss is its expectation over the label,
    ``p (h - 1/(2 eta))^2 + (1 - p) (h + 1/(2 eta))^2``, which is ``(h - (p - 1/2)/eta)^2`` plus
    ``p (1 - p) / eta^2``, a constant: the gradients are the same.

    ``tau = eta`` is IPO against the reference, ``tau = 0`` against the previous iterate, both
    with beta = eta.

    Args:
        policy_chosen: [pairs], nats, **summed** over completion tokens including EOS. Means per
            token would never come near a target of ``1/(2 eta)`` nats.
        policy_rejected: [pairs], likewise.
        reference_chosen: [pairs], likewise under the reference, the same in all iterations.
        reference_rejected: [pairs], likewise.
        previous_chosen: [pairs], likewise under the policy at the start of this iteration.
        previous_rejected: [pairs], likewise.
        eta: Weight of the KL divergence to the previous iterate, > 0; an inverse step size. The
            target of ``h`` is ``1/(2 eta)`` nats.
        tau: Weight of the KL divergence to the reference, from 0 to ``eta``.
        p_chosen: [pairs], probability in [0, 1] that the chosen completion is the better one; None
            means 1.

    Returns:
        [pairs], in the dtype of the log-probs.

    Raises:
        PrefoptError: ``eta`` or ``tau`` outside its range; shapes that differ; ``p_chosen``
            outside [0, 1].

    Examples:
        >>> import torch
        >>> policy = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> reference = torch.tensor([-11.0]), torch.tensor([-11.5])
        >>> previous = torch.tensor([-10.5]), torch.tensor([-11.5])
        >>> inpo_loss(*policy, *reference, *previous, eta=0.1, tau=0.05)
        tensor([14.0625])
    """
    if not eta > 0:
        raise PrefoptError(f"inpo: found eta={eta}, expected a value above 0")
    if not 0 <= tau <= eta:
        raise PrefoptError(
            f"inpo: found tau={tau}, expected a value from 0 to eta={eta}; set it to a third of "
            "eta, for instance"
        )
    check_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        previous_chosen=previous_chosen,
        previous_rejected=previous_rejected,
        p_chosen=p_chosen,
    )
    p = check_probability("p_chosen", p_chosen, policy_chosen.dtype)
    to_reference = tau / eta
    h = (
        (policy_chosen - policy_rejected)
        - to_reference * (reference_chosen - reference_rejected)
        - (1 - to_reference) * (previous_chosen - previous_rejected)
    )
    target = 1 / (2 * eta)
    loss = (h - target) ** 2
    return loss if p is None else expected_loss(p, loss, (h + target) ** 2)
