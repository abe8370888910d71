"""Training of Bradley-Terry reward models on prompt trees.

The pair of a prompt shares its prompt tokens; the score is read at each completion's last token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.objectives import bradley_terry_loss
from prefopt.trainers.base import TreeTrainer, TreeTrainerConfig
from prefopt.trainers.pairs import PairSource, as_trees


@dataclass
class RewardModelConfig(TreeTrainerConfig):
    """Keys of the reward model; learning rate 2e-6 is the value of the RLHF Workflow recipe."""

    learning_rate: float = field(default=2e-6, metadata={"help": "Peak learning rate."})
    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the squared sum of a pair's scores."}
    )


class JudgeTrainer(TreeTrainer):
    """Base of the judges' trainers: a reading of each answer, and a loss of the pair's two."""

    def readings(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What the judge says of each completion, [2 trees], the pair's two in turn."""
        raise NotImplementedError

    def pair_losses(
        self, readings: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One loss a pair and the metrics to average, each [trees]."""
        raise NotImplementedError

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, and its metrics."""
        return self.pair_losses(self.readings(model, inputs), inputs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Loss, and the readings [trees, 2] where they are asked for."""
        if prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            readings = self.readings(model, inputs)
            losses, _ = self.pair_losses(readings, inputs)
        return losses.mean(), readings.view(-1, 2), None


class RewardModelTrainer(JudgeTrainer):
    """Fits a sequence classifier with one label to pairs; soft labels and margins are used.

    Args:
        model: The classifier.
        args: A :class:`RewardModelConfig`.
        train_dataset: Rows of preference pairs (docs/data.md), which ``processing_class`` then
            tokenises, or trees of two completions, the chosen one first.
        **kwargs: As for :class:`prefopt.trainers.base.TreeTrainer`.
    """

    def __init__(
        self, model: nn.Module, args: RewardModelConfig, train_dataset: PairSource, **kwargs: Any
    ) -> None:
        super().__init__(model, args, **as_trees(args, train_dataset, kwargs))

    def readings(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The score of each completion, [2 trees]."""
        scores: Tensor = model(trees=inputs["trees"])["scores"]
        return scores

    def pair_losses(
        self, readings: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The Bradley-Terry loss of each pair, and its metrics."""
        chosen, rejected = readings[0::2], readings[1::2]
        losses = bradley_terry_loss(
            chosen,
            rejected,
            margin=inputs.get("margin"),
            p_chosen=inputs.get("p_chosen"),
            centering=self.args.center_rewards_coefficient,
        )
        with torch.no_grad():
            metrics = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": (chosen > rejected).float(),
            }
        return losses, metrics
