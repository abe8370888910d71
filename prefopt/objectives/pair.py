"""Losses on (chosen, rejected) pairs: DPO and its relatives.

Notation, per pair: ``lp`` and ``rf`` are the log-probabilities of a completion, summed over its
tokens (EOS included), under the policy and under the frozen reference; ``w`` is the chosen and
``l`` the rejected completion; ``a = lp(w) - rf(w)``, ``c = lp(l) - rf(l)``, ``d = a - c``;
``|y|`` is a length in tokens; ``s`` is the sigmoid and ``ls`` its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt.errors import PrefoptError


@dataclass(frozen=True)
class Pairs:
    """What a loss reads; ``name`` is for its error messages, every tensor has shape [pairs]."""

    name: str
    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    beta: float = 0.1
    label_smoothing: float = 0.0
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    p_chosen: Tensor | None = None
    p_rejected: Tensor | None = None
    gamma: float = 0.5
    tau: float = 0.05
    delta: float = 0.0

    @property
    def references(self) -> tuple[Tensor, Tensor]:
        """``rf(w), rf(l)`` in nats."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise PrefoptError(
                f"{self.name}: found None, expected the reference's log-probs of both completions; "
                "pass reference_chosen and reference_rejected or use the loss 'simpo'"
            )
        return self.reference_chosen, self.reference_rejected

    @property
    def a(self) -> Tensor:
        """``lp(w) - rf(w)`` in nats."""
        return self.policy_chosen - self.references[0]

    @property
    def c(self) -> Tensor:
        """``lp(l) - rf(l)`` in nats."""
        return self.policy_rejected - self.references[1]

    @property
    def d(self) -> Tensor:
        """``a - c`` in nats."""
        return self.a - self.c

    def per_token(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """``chosen / |w| - rejected / |l|``, in nats per token."""
        if self.chosen_lengths is None or self.rejected_lengths is None:
            raise PrefoptError(
                f"{self.name}: found no completion lengths, expected tokens per completion, EOS "
                "included; pass chosen_lengths and rejected_lengths"
            )
        return chosen / self.chosen_lengths - rejected / self.rejected_lengths

    def swapped(self) -> Pairs:
        """The same pairs under the opposite label: log-probs and lengths change sides."""
        return replace(
            self,
            policy_chosen=self.policy_rejected,
            policy_rejected=self.policy_chosen,
            reference_chosen=self.reference_rejected,
            reference_rejected=self.reference_chosen,
            chosen_lengths=self.rejected_lengths,
            rejected_lengths=self.chosen_lengths,
        )


def sigmoid(x: Pairs) -> Tensor:
    """DPO, ``-ls(beta d)`` (Rafailov et al., arXiv 2305.18290, Eq. 7)."""
    return -logsigmoid(x.beta * x.d)


def cdpo(x: Pairs) -> Tensor:
    """Conservative DPO, ``-(1-eps) ls(beta d) - eps ls(-beta d)``.

    Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023, Eq. 3
    (ericmitchell.ai/cdpo.pdf); eps is ``label_smoothing``.
    """
    return _smoothed(x, x.beta * x.d)


def hinge(x: Pairs) -> Tensor:
    """Hinge loss, ``max(0, 1 - beta d)``.

    The hinge of SLiC-HF (Zhao et al., arXiv 2305.10425, section 2) on log-ratios to the reference:
    "hinge-norm" of RSO (Liu et al., arXiv 2309.06657), whose gamma is our beta.
    """
    return torch.relu(1 - x.beta * x.d)


def ipo(x: Pairs) -> Tensor:
    """IPO on per-token means, ``(a/|w| - c/|l| - 1/(2 beta))^2``.

    Azar et al., arXiv 2310.12036, Eq. 17, with beta for the paper's tau. The paper does not print
    the division by lengths; TRL's source says that the paper's authors confirmed it.
    """
    return (x.per_token(x.a, x.c) - 1 / (2 * x.beta)) ** 2


def ipo_sum(x: Pairs) -> Tensor:
    """IPO as printed, ``(d - 1/(2 beta))^2`` (Azar et al., arXiv 2310.12036, Eq. 17)."""
    return (x.d - 1 / (2 * x.beta)) ** 2


def exo_pair(x: Pairs) -> Tensor:
    """EXO for two completions, ``KL((s(beta d), s(-beta d)) || (1-eps, eps))``.

    Ji et al., arXiv 2402.00856, Eq. 16: ``s(beta d) [ls(beta d) - ln(1-eps)]
    + s(-beta d) [ls(-beta d) - ln eps]``; eps is ``label_smoothing``.
    """
    eps = x.label_smoothing
    if not 0 < eps < 1:
        raise PrefoptError(
            f"{x.name}: found label_smoothing={eps}, expected a value above 0 and below 1 "
            "(the loss takes its logarithm); set label_smoothing, for instance 1e-3"
        )
    z = x.beta * x.d
    as_labelled = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-eps))
    flipped = torch.sigmoid(-z) * (logsigmoid(-z) - math.log(eps))
    return as_labelled + flipped


def nca_pair(x: Pairs) -> Tensor:
    """NCA for two completions, ``-ls(beta a) - 1/2 ls(-beta a) - 1/2 ls(-beta c)``.

    Chen et al., arXiv 2402.05369, section 4.1; beta is the paper's alpha.
    """
    chosen, rejected = x.beta * x.a, x.beta * x.c
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(x: Pairs) -> Tensor:
    """Robust DPO, ``[-(1-eps) ls(beta d) + eps ls(-beta d)] / (1 - 2 eps)``.

    Chowdhury et al., arXiv 2403.00409, section 3.1. With eps (``label_smoothing``) the rate of
    flipped labels, its expectation over the flips is the DPO loss of the clean labels.
    """
    eps = x.label_smoothing
    if not 0 <= eps < 0.5:
        raise PrefoptError(
            f"{x.name}: found label_smoothing={eps}, expected a rate of flipped labels from 0 to "
            "below 1/2; set label_smoothing, for instance 0.1"
        )
    z = x.beta * x.d
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def bco_pair(x: Pairs) -> Tensor:
    """BCO on a pair, ``-ls(beta a - delta) - ls(-(beta c - delta))``.

    Jung et al., arXiv 2404.04656, section 4; delta is the paper's reward shift (a mean of
    ``beta a`` and ``beta c``, in the caller's keeping), 0 in TRL.
    """
    return -logsigmoid(x.beta * x.a - x.delta) - logsigmoid(-(x.beta * x.c - x.delta))


def sppo_hard(x: Pairs) -> Tensor:
    """SPPO with win rates 1 and 0, ``(a - 1/(2 beta))^2 + (c + 1/(2 beta))^2``.

    Wu et al., arXiv 2405.00675, Algorithm 1, Eq. 4.7; beta is 1/eta of the paper.
    """
    return (x.a - 0.5 / x.beta) ** 2 + (x.c + 0.5 / x.beta) ** 2


def sppo_soft(x: Pairs) -> Tensor:
    """SPPO, ``(a - (P_w - 1/2)/beta)^2 + (c - (P_l - 1/2)/beta)^2``.

    Wu et al., arXiv 2405.00675, Algorithm 1, Eq. 4.7; beta is 1/eta of the paper. ``P_y`` is the
    estimated win rate of y against the policy that produced the pair, which is the reference.
    """
    if x.p_chosen is None:
        raise PrefoptError(
            f"{x.name}: found p_chosen=None, expected the win rate of each chosen completion; "
            "pass p_chosen or use the loss 'sppo_hard'"
        )
    p_rejected = 1 - x.p_chosen if x.p_rejected is None else x.p_rejected
    chosen = x.a - (x.p_chosen - 0.5) / x.beta
    rejected = x.c - (p_rejected - 0.5) / x.beta
    return chosen**2 + rejected**2


def aot(x: Pairs) -> Tensor:
    """AOT for paired data: cDPO on sorted ``lp(w) - lp(l)`` minus sorted ``rf(w) - rf(l)``.

    Melnyk et al., arXiv 2406.05882, section 3. Position i of the result is the i-th quantile of
    the batch, not pair i.
    """
    reference_chosen, reference_rejected = x.references
    policy = torch.sort(x.policy_chosen - x.policy_rejected).values
    reference = torch.sort(reference_chosen - reference_rejected).values
    return _smoothed(x, x.beta * (policy - reference))


def aot_unpaired(x: Pairs) -> Tensor:
    """AOT for unpaired data: cDPO on sorted ``a`` minus sorted ``c``.

    Melnyk et al., arXiv 2406.05882, section 3. Position i of the result is the i-th quantile of
    the batch, not pair i.
    """
    return _smoothed(x, x.beta * (torch.sort(x.a).values - torch.sort(x.c).values))


def apo_zero(x: Pairs) -> Tensor:
    """APO-zero, ``1 - s(beta a) + s(beta c)`` (D'Oosterlinck et al., arXiv 2408.06266, Eq. 7)."""
    return torch.sigmoid(-x.beta * x.a) + torch.sigmoid(x.beta * x.c)


def apo_down(x: Pairs) -> Tensor:
    """APO-down, ``s(beta a) + 1 - s(beta d)`` (D'Oosterlinck et al., arXiv 2408.06266, Eq. 8)."""
    return torch.sigmoid(x.beta * x.a) + torch.sigmoid(-x.beta * x.d)


def discopop(x: Pairs) -> Tensor:
    """DiscoPOP, ``-(1-m) ls(z) + m exp(-z)`` with ``z = beta d`` and ``m = s(z / tau)``.

    Lu et al., arXiv 2406.08414, Eq. 5.
    """
    z = x.beta * x.d
    modulation = z / x.tau
    # m exp(-z) as one exponential: for very negative z the product would be 0 * inf.
    exponential = torch.exp(logsigmoid(modulation) - z)
    return -torch.sigmoid(-modulation) * logsigmoid(z) + exponential


def sigmoid_norm(x: Pairs) -> Tensor:
    """Length-normalised DPO, ``-ls(beta (a/|w| - c/|l|))`` (Lambert et al., Tulu 3, 2411.15124)."""
    return -logsigmoid(x.beta * x.per_token(x.a, x.c))


def simpo(x: Pairs) -> Tensor:
    """SimPO, ``-ls(beta (lp(w)/|w| - lp(l)/|l|) - gamma)``, without a reference.

    Meng et al., arXiv 2405.14734, Eq. 6. gamma is not multiplied by beta.
    """
    return -logsigmoid(x.beta * x.per_token(x.policy_chosen, x.policy_rejected) - x.gamma)


PAIR_LOSSES: Mapping[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "sppo_soft": sppo_soft,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
}

# Losses for which soft labels are not defined, and why.
HARD_LABELS_ONLY = {
    "exo_pair": "its target is 1 - label_smoothing and an average over labels would fit another",
    "aot": "it sorts across the batch and no longer knows which pair a label belongs to",
    "aot_unpaired": "it sorts across the batch and no longer knows which pair a label belongs to",
}


def needs_reference(name: str) -> bool:
    """Whether the loss ``name`` reads the log-probs of the reference model."""
    _lookup(name)
    return name != "simpo"


def pair_loss(
    name: str,
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    p_chosen: Tensor | None = None,
    p_rejected: Tensor | None = None,
    gamma: float = 0.5,
    tau: float = 0.05,
    delta: float = 0.0,
) -> Tensor:
    """One loss per pair, differentiable in the policy's log-probs.

    A loss ignores the arguments it does not read; docs/objectives.md says which reads what.
    With soft labels the result is the expected loss over the label,
    ``p_chosen * loss(w, l) + (1 - p_chosen) * loss(l, w)``; lengths change sides with the labels.

    Args:
        name: A key of ``PAIR_LOSSES``.
        policy_chosen: [pairs], nats, summed over completion tokens including EOS.
        policy_rejected: [pairs], likewise.
        reference_chosen: [pairs], likewise under the reference; None only for ``simpo``.
        reference_rejected: [pairs], likewise.
        beta: Strength of the pull to the reference, > 0, in 1/nats.
        label_smoothing: eps of ``cdpo``, ``robust``, ``exo_pair``, ``aot`` and ``aot_unpaired``.
        chosen_lengths: [pairs], tokens including EOS, for ``ipo``, ``sigmoid_norm``, ``simpo``.
        rejected_lengths: [pairs], likewise.
        p_chosen: [pairs], probability in [0, 1] that the chosen completion is the better one; None
            means 1. For ``sppo_soft``, which needs it, the win rate of the chosen completion.
        p_rejected: [pairs], win rate of the rejected completion for ``sppo_soft``; None means
            ``1 - p_chosen``.
        gamma: Target margin of ``simpo``, in units of the logit (not multiplied by beta).
        tau: Temperature of the blend in ``discopop``, > 0.
        delta: Reward shift of ``bco_pair``.

    Returns:
        [pairs], in the dtype of the log-probs. For ``aot`` and ``aot_unpaired`` position i is the
        i-th quantile of the batch, not pair i.

    Raises:
        PrefoptError: Unknown name; a value outside its range; shapes that differ; an input the
            loss needs is missing; soft labels for a loss that has no such form.

    Examples:
        >>> import torch
        >>> policy = torch.tensor([-10.0]), torch.tensor([-12.0])
        >>> reference = torch.tensor([-11.0]), torch.tensor([-11.5])
        >>> pair_loss("sigmoid", *policy, *reference, beta=0.1)
        tensor([0.6210])

        A label that is right nine times in ten:

        >>> pair_loss("sigmoid", *policy, *reference, beta=0.1, p_chosen=torch.tensor([0.9]))
        tensor([0.6360])

        SimPO needs lengths and no reference:

        >>> lengths = dict(chosen_lengths=torch.tensor([20]), rejected_lengths=torch.tensor([30]))
        >>> pair_loss("simpo", *policy, None, None, beta=2.0, gamma=0.5, **lengths)
        tensor([1.1032])
    """
    loss = _lookup(name)
    for setting, value in (("beta", beta), ("tau", tau)):
        if not value > 0:
            raise PrefoptError(f"{name}: found {setting}={value}, expected a value above 0")
    check_shapes(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        p_chosen=p_chosen,
        p_rejected=p_rejected,
    )
    pairs = Pairs(
        name,
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        beta=beta,
        label_smoothing=label_smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        p_chosen=check_probability("p_chosen", p_chosen, policy_chosen.dtype),
        p_rejected=check_probability("p_rejected", p_rejected, policy_chosen.dtype),
        gamma=gamma,
        tau=tau,
        delta=delta,
    )
    if name == "sppo_soft" or pairs.p_chosen is None:
        return loss(pairs)
    if name in HARD_LABELS_ONLY:
        raise PrefoptError(
            f"{name}: found soft labels in p_chosen, expected None: {HARD_LABELS_ONLY[name]}; "
            "drop p_chosen or use the loss 'sigmoid'"
        )
    return expected_loss(pairs.p_chosen, loss(pairs), loss(pairs.swapped()))


def expected_loss(p_chosen: Tensor, as_labelled: Tensor, swapped: Tensor) -> Tensor:
    """The mean of a pairwise loss over an uncertain label, [pairs].

    Args:
        p_chosen: [pairs], probability that the label is right.
        as_labelled: [pairs], loss(w, l).
        swapped: [pairs], loss(l, w).
    """
    return p_chosen * as_labelled + (1 - p_chosen) * swapped


def check_shapes(**tensors: Tensor | None) -> None:
    """Every tensor given must have the shape [pairs] of the first.

    Raises:
        PrefoptError: A shape differs, so that broadcasting would mix pairs.
    """
    first, shape = next((name, t.shape) for name, t in tensors.items() if t is not None)
    if len(shape) != 1:
        raise PrefoptError(f"{first}: found shape {list(shape)}, expected [pairs]; flatten it")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise PrefoptError(
                f"{name}: found shape {list(tensor.shape)}, expected {list(shape)} like {first}; "
                "give one value per pair"
            )


def check_probability(name: str, p: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``p`` in ``dtype``, once every value lies in [0, 1]; None stays None.

    Raises:
        PrefoptError: A value lies outside [0, 1] or is not a number.
    """
    if p is None:
        return None
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise PrefoptError(
            f"{name}: found values from {p.min().item():g} to {p.max().item():g}, expected "
            "probabilities in [0, 1]; correct the labels"
        )
    return p.to(dtype)


def _smoothed(x: Pairs, z: Tensor) -> Tensor:
    eps = x.label_smoothing
    if not 0 <= eps <= 1:
        raise PrefoptError(
            f"{x.name}: found label_smoothing={eps}, expected a probability in [0, 1]; "
            "set 0 for none"
        )
    return -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)


def _lookup(name: str) -> Callable[[Pairs], Tensor]:
    if name not in PAIR_LOSSES:
        nearest = get_close_matches(name, PAIR_LOSSES, n=1, cutoff=0)[0]
        raise PrefoptError(
            f"loss: found {name!r}, did you mean {nearest!r}? Expected one of "
            f"{', '.join(PAIR_LOSSES)}"
        )
    return PAIR_LOSSES[name]
