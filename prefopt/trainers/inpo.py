"""INPO: no-regret learning of the Nash policy of a preference model by regression on pairs.

Zhang et al., arXiv 2407.00617. Every round samples from pi_t, has pairs compared, and fits
log-ratios to pi_t and to the initial policy by least squares.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.models.logprobs import sequence_log_probs
from prefopt.objectives import inpo_loss
from prefopt.trainers.dpo import pair_metrics
from prefopt.trainers.pair_rounds import PairRoundConfig, PairRoundTrainer

logger = logging.getLogger(__name__)


@dataclass
class INPOConfig(PairRoundConfig):
    """Keys of INPO.

    eta and tau are the values that public re-implementations give as the paper's. The loss is about
    ``1 / (4 eta^2)``, 4444, at the start: what counts is its gradient, which is clipped.
    """

    eta: float = field(
        default=7.5e-3, metadata={"help": "Weight of staying near pi_t (an inverse step size)."}
    )
    tau: float = field(
        default=2.5e-3, metadata={"help": "Weight of the KL to the reference, from 0 to eta."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps, or below 1 their share."})
    pairing: str = field(
        default="tournament",
        metadata={"help": "tournament | independent (as the theory assumes) | ..."},
    )
    soft_labels: bool = field(
        default=True, metadata={"help": "Label with the judge's probability instead of 1."}
    )
    ties: str = field(
        default="keep", metadata={"help": "Pairs the judge finds equal: drop | keep | resample."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        nothing = torch.zeros(1)
        inpo_loss(*[nothing] * 6, eta=self.eta, tau=self.tau)  # refuses values out of range
        if (self.reference, self.data_window) != ("initial", "this_round"):
            logger.warning(
                "reference=%s and data_window=%s are not used by inpo: its pairs are samples of "
                "pi_t, and tau anchors it to the initial policy (tau=0 leaves pi_t alone)",
                self.reference,
                self.data_window,
            )
            self.reference, self.data_window = "initial", "this_round"


class INPOTrainer(PairRoundTrainer):
    """Trains on pairs of its own samples; see :class:`prefopt.trainers.rounds.RoundTrainer`."""

    config = INPOConfig
    args: INPOConfig

    @property
    def frozen(self) -> tuple[str, ...]:
        """The policy the run began with, and the one that drew the samples."""
        return ("reference", "previous")

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The squared error of each pair; rewards are ``tau`` times the log-ratio to the start."""
        log_probs = sequence_log_probs(model, inputs["trees"])
        reference, previous = inputs["reference"], inputs["previous"]
        losses = inpo_loss(
            log_probs[0::2],
            log_probs[1::2],
            reference[0::2],
            reference[1::2],
            previous[0::2],
            previous[1::2],
            eta=self.args.eta,
            tau=self.args.tau,
            p_chosen=inputs.get("p_chosen"),
        )
        return losses, pair_metrics(log_probs, reference, self.args.tau)
