"""The Bradley-Terry loss of scalar reward models."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.objectives.pair import check_probability, check_shapes, expected_loss


def bradley_terry_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | None = None,
    p_chosen: Tensor | None = None,
    centering: float = 0.0,
) -> Tensor:
    """One loss per pair, ``-log s(r_w - r_l - margin) + centering (r_w + r_l)^2``.

    The first term is the reward-model loss of InstructGPT (Ouyang et al., arXiv 2203.02155, Eq. 1)
    with the margin of Llama 2 (Touvron et al., arXiv 2307.09288, Eq. 2); the second keeps scores
    near zero (Eisenstein et al., arXiv 2312.09244, Eq. 2; TRL's ``center_rewards_coefficient``).
    With soft labels the first term is its expectation over the label, and the margin is asked of
    whichever completion wins.

    Args:
        chosen_scores: [pairs], scores ``r_w``, without unit.
        rejected_scores: [pairs], scores ``r_l``.
        margin: [pairs], how far apart the scores should be; None means 0.
        p_chosen: [pairs], probability in [0, 1] that the chosen completion is the better one; None
            means 1.
        centering: Weight of the centring term.

    Returns:
        [pairs], differentiable in the scores.

    Raises:
        PrefoptError: Shapes differ, or ``p_chosen`` leaves [0, 1].

    Examples:
        >>> import torch
        >>> bradley_terry_loss(torch.tensor([1.5]), torch.tensor([0.5]))
        tensor([0.3133])
        >>> bradley_terry_loss(torch.tensor([1.5]), torch.tensor([0.5]), centering=0.01)
        tensor([0.3533])
    """
    check_shapes(
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        margin=margin,
        p_chosen=p_chosen,
    )
    p = check_probability("p_chosen", p_chosen, chosen_scores.dtype)
    difference = chosen_scores - rejected_scores
    required = 0.0 if margin is None else margin
    loss = -logsigmoid(difference - required)
    if p is not None:
        loss = expected_loss(p, loss, -logsigmoid(-difference - required))
    return loss + centering * (chosen_scores + rejected_scores) ** 2


def answer_loss(log_prob_a: Tensor, log_prob_b: Tensor, p_a: Tensor) -> Tensor:
    """One loss per comparison, ``-p_a log pi("A") - (1 - p_a) log pi("B")``.

    The cross-entropy of a pairwise preference model's one-token answer over its whole vocabulary:
    supervised fine-tuning on "A" or "B" (RLHF Workflow, Dong et al., arXiv 2405.07863),
    in expectation over an uncertain label. It ends at ``pi("A") = p_a``, ``pi("B") = 1 - p_a``,
    where it is the label's entropy.

    Args:
        log_prob_a: [comparisons], log-prob of the answer token "A".
        log_prob_b: [comparisons], that of "B".
        p_a: [comparisons], probability in [0, 1] that the answer called A is the better one.

    Returns:
        [comparisons], in nats, differentiable in the log-probs.

    Raises:
        PrefoptError: Shapes differ, or ``p_a`` leaves [0, 1].

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.5, 0.0]])
        >>> a, b, _ = logits.log_softmax(-1).T
        >>> answer_loss(a, b, torch.tensor([0.8]))
        tensor([0.6064])
    """
    check_shapes(log_prob_a=log_prob_a, log_prob_b=log_prob_b, p_a=p_a)
    p = p_a.to(log_prob_a.dtype)
    check_probability("p_a", p, p.dtype)
    return expected_loss(p, -log_prob_a, -log_prob_b)
