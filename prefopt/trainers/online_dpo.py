"""Online iterative DPO: sample, judge, pair, and a DPO loss against a fixed reference, in rounds.

RLHF Workflow: Dong et al., arXiv 2405.07863, Algorithm 2 and section 3.3. The paper's text keeps
the initial policy as the reference; its released scripts take the previous one instead
(``reference: previous``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from prefopt.errors import PrefoptError
from prefopt.objectives import HARD_LABELS_ONLY, needs_reference
from prefopt.trainers.dpo import DPOConfig, pair_tree_losses
from prefopt.trainers.pair_rounds import PairRoundConfig, PairRoundTrainer


@dataclass
class OnlineDPOConfig(PairRoundConfig, DPOConfig):
    """Keys of rounds and of the DPO family.

    Learning rate 5e-7, beta 0.1, cosine with 3 % warm-up, 2 passes over the pairs of a round and
    best-against-worst pairs are the values of the RLHF Workflow paper (its 8 samples a prompt are
    the rollout section's business).
    """

    num_train_epochs: float = field(
        default=2.0, metadata={"help": "Passes over the pairs of a round."}
    )
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps, or below 1 their share."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type in HARD_LABELS_ONLY and (self.soft_labels or self.ties == "keep"):
            raise PrefoptError(
                f"loss_type {self.loss_type!r} knows no soft labels: set soft_labels to false and "
                "ties to drop or resample, or use another loss, such as sigmoid"
            )
        if self.loss_type == "sppo_soft" and not self.soft_labels:
            raise PrefoptError("loss_type 'sppo_soft' needs soft_labels: true")


class OnlineDPOTrainer(PairRoundTrainer):
    """Trains on pairs of its own samples; see :class:`prefopt.trainers.rounds.RoundTrainer`."""

    config = OnlineDPOConfig

    args: OnlineDPOConfig

    @property
    def frozen(self) -> tuple[str, ...]:
        """The reference, for a loss that has one."""
        return ("reference",) if needs_reference(self.args.loss_type) else ()

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair and the metrics of DPO."""
        return pair_tree_losses(self.args, model, inputs)
