"""Offline preference optimisation on pairs: DPO and the losses of its family.

DPO: Rafailov et al., arXiv 2305.18290; the other losses are listed in ``docs/objectives.md``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import PrefoptError
from prefopt.models.logprobs import sequence_log_probs
from prefopt.objectives import HARD_LABELS_ONLY, needs_reference, pair_loss
from prefopt.trainers.base import TreeDataset, TreeTrainer, TreeTrainerConfig
from prefopt.trainers.pairs import PairSource, as_trees
from prefopt.trainers.reference import (
    reference_log_probs,
    report_initial_margins,
    shared_fingerprint,
)

logger = logging.getLogger(__name__)

SMOOTHED = ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired")  # losses with label_smoothing


@dataclass
class DPOConfig(TreeTrainerConfig):
    """Keys of the DPO family; beta 0.1 is the value of the RLHF Workflow recipe."""

    beta: float = field(default=0.1, metadata={"help": "Strength of the tie to the reference."})
    loss_type: str = field(default="sigmoid", metadata={"help": "A name of docs/objectives.md."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of flipped labels (cdpo, robust, exo_pair, aot)."}
    )
    gamma: float = field(default=0.5, metadata={"help": "SimPO's target margin."})
    discopop_tau: float = field(default=0.05, metadata={"help": "DiscoPOP's temperature."})

    def __post_init__(self) -> None:
        nothing, one = torch.zeros(1), torch.ones(1)
        pair_loss(  # refuses an unknown name and values outside the loss's domain
            self.loss_type,
            *[nothing] * 4,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            chosen_lengths=one,
            rejected_lengths=one,
            p_chosen=one if self.loss_type == "sppo_soft" else None,
        )
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise PrefoptError(
                f"trainer.label_smoothing={self.label_smoothing} has no effect on loss_type "
                f"{self.loss_type!r}; set it to 0, or use one of {', '.join(SMOOTHED)}"
            )
        super().__post_init__()


class DPOTrainer(TreeTrainer):
    """Trains on stored pairs against reference log-probs that are computed once and kept on disk.

    The reference is the policy as it is handed in; with ``peft_config``, the model under the new
    adapter.

    Args:
        model: The policy.
        args: A :class:`DPOConfig`.
        train_dataset: Rows of preference pairs (docs/data.md), which ``processing_class`` then
            tokenises, or trees of two completions, the chosen one first.
        **kwargs: As for :class:`prefopt.trainers.base.TreeTrainer`.
    """

    def __init__(
        self, model: nn.Module, args: DPOConfig, train_dataset: PairSource, **kwargs: Any
    ) -> None:
        self.uses_reference = needs_reference(args.loss_type)
        # taken before an adapter is added and before a checkpoint is loaded
        self.fingerprint = shared_fingerprint(model) if self.uses_reference else ""
        self.new_adapter = kwargs.get("peft_config") is not None
        arguments = as_trees(args, train_dataset, kwargs)
        for name in ("train_dataset", "eval_dataset"):
            if arguments[name] is not None:
                check_columns(args.loss_type, arguments[name], name)
        super().__init__(model, args, **arguments)

    def before_training(self, resumed: bool) -> None:
        """Stores the reference log-probs and states the margins at step 0."""
        super().before_training(resumed)
        if not self.uses_reference:
            return
        for dataset in filter(None, (self.train_dataset, self.eval_dataset)):
            dataset.columns["reference"] = reference_log_probs(
                self, dataset, self.fingerprint, adapter=self.new_adapter, resumed=resumed
            )
        if not resumed:
            report_initial_margins(self, self.train_dataset, self.args.beta)

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The pair loss and the metrics TRL's users know."""
        if self.uses_reference and "reference" not in inputs:
            raise PrefoptError(
                "this data set has no reference log-probs: hand it in as train_dataset or "
                "eval_dataset and call train(), which computes them"
            )
        return pair_tree_losses(self.args, model, inputs)


def pair_tree_losses(
    args: DPOConfig, model: nn.Module, inputs: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair of a batch of pairs and its metrics, each [trees]."""
    return dpo_losses(
        args,
        sequence_log_probs(model, inputs["trees"]),
        inputs["trees"].lengths,
        reference=inputs.get("reference"),
        p_chosen=inputs.get("p_chosen"),
    )


def dpo_losses(
    args: DPOConfig,
    log_probs: Tensor,
    lengths: Tensor,
    *,
    reference: Tensor | None,
    p_chosen: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair that a config asks for, and its metrics, each [pairs].

    Args:
        args: The config.
        log_probs: The policy's, [2 pairs], chosen and rejected in turn.
        lengths: Tokens of each completion, [2 pairs].
        reference: The reference's log-probs, [2 pairs]; None for a loss that needs none.
        p_chosen: Soft labels, [pairs]; None: all 1.
    """
    reference = torch.zeros_like(log_probs) if reference is None else reference
    losses = pair_loss(
        args.loss_type,
        log_probs[0::2],
        log_probs[1::2],
        reference[0::2],
        reference[1::2],
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        chosen_lengths=lengths[0::2],
        rejected_lengths=lengths[1::2],
        p_chosen=p_chosen,
        gamma=args.gamma,
        tau=args.discopop_tau,
    )
    return losses, pair_metrics(log_probs, reference, args.beta)


def pair_metrics(log_probs: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """The metrics of pairs under TRL's names, each [pairs].

    Args:
        log_probs: The policy's, [2 pairs], chosen and rejected in turn.
        reference: The reference's, likewise.
        beta: Reward per nat of log-ratio.
    """
    with torch.no_grad():
        rewards = beta * (log_probs - reference)
        margins = rewards[0::2] - rewards[1::2]
        return {
            "rewards/chosen": rewards[0::2],
            "rewards/rejected": rewards[1::2],
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": log_probs[0::2],
            "logps/rejected": log_probs[1::2],
        }


def check_columns(loss_type: str, dataset: TreeDataset, name: str) -> None:
    """Refuses labels as `check_labels` does, and says so where margins are not used."""
    check_labels(loss_type, dataset, name)
    if "margin" in dataset.columns:
        logger.warning("%s: the margins are not used by dpo", name)


def check_labels(loss_type: str, dataset: TreeDataset, name: str) -> None:
    """Refuses soft labels that a loss cannot use, or that it needs and are not there.

    Raises:
        PrefoptError: As said.
    """
    has_labels = "p_chosen" in dataset.columns
    if loss_type == "sppo_soft" and not has_labels:
        raise PrefoptError(f"loss_type 'sppo_soft' needs a column p_chosen in {name}")
    if loss_type in HARD_LABELS_ONLY and has_labels:
        raise PrefoptError(
            f"{name} holds soft labels (p_chosen), which loss_type {loss_type!r} does not define; "
            "remove the column or use another loss, such as sigmoid"
        )
