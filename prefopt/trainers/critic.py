"""A second model that is trained beside the policy, by the same steps: the critic of PPO.

transformers' loop knows one model. The critic's weights are a group of their own in its optimiser,
so that schedule, accumulation and checkpoints are shared; what the loop does to its model alone
(wrapping, clipping, clearing gradients, saving) is done for the critic here.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.models.critic import make_critic, reads_same_tokens
from prefopt.models.forward import enable_trees
from prefopt.rounds.weights import put_weights, read_weights, save_weights, trainable_weights
from prefopt.trainers.base import disable_dropout
from prefopt.trainers.reference import shared_fingerprint
from prefopt.trainers.sample_rounds import SampleRoundTrainer


class CriticTrainer(SampleRoundTrainer):
    """Base of the trainers with a critic.

    The critic begins as the judge where that is a reward model that reads the policy's tokens, and
    else as the policy's trunk with values of 0. It is in checkpoints, not in ``final``.

    Args:
        model: The policy.
        args: The configuration.
        train_dataset: As for :class:`prefopt.trainers.rounds.RoundTrainer`.
        judge: The judge.
        critic: A one-label sequence classifier that reads the policy's tokens, instead.
        **kwargs: As for :class:`prefopt.trainers.rounds.RoundTrainer`.

    Raises:
        PrefoptError: An optimiser was handed in, which would not know the critic's weights.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        train_dataset: Any,
        judge: Judge | None = None,
        critic: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if any(kwargs.get("optimizers", ())):
            raise PrefoptError(
                f"{type(self).__name__}: found optimizers, which do not know the critic's weights; "
                "choose the optimiser in the configuration (optim, learning_rate)"
            )
        if critic is None:
            critic = make_critic(model, _judge_model(judge, kwargs.get("processing_class")))
        self.critic_fingerprint = shared_fingerprint(critic)
        self.critic: nn.Module = critic
        super().__init__(model, args, train_dataset, judge=judge, **kwargs)
        if args.disable_dropout:
            disable_dropout(critic)
        enable_trees(critic)
        if args.gradient_checkpointing:
            critic.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        if kwargs.get("peft_config") is not None:
            from peft import get_peft_model

            adapter = copy.deepcopy(kwargs["peft_config"])
            adapter.task_type = "SEQ_CLS"  # for which the score head is trained beside the adapter
            self.critic = get_peft_model(critic, adapter)
        self.critic_wrapped: nn.Module = self.critic.to(self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adds the critic's weights to the policy's as a group with a learning rate of its own."""
        begun = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if not begun:
            rate = self.args.critic_learning_rate
            optimizer.add_param_group(
                {
                    "params": [p for p in self.critic.parameters() if p.requires_grad],
                    "lr": self.args.learning_rate if rate is None else rate,
                    "weight_decay": self.args.weight_decay,
                }
            )
        return optimizer

    def before_training(self, resumed: bool) -> None:
        """Wraps the critic as transformers has wrapped the policy."""
        super().before_training(resumed)
        if self.accelerator.num_processes > 1 and self.critic_wrapped is self.critic:
            self.critic_wrapped = self.accelerator.prepare_model(self.critic)

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Clips and checks the critic's gradient, by itself, once the policy's is."""
        norm = super()._get_grad_norm(model, grad_norm)
        limit = self.args.max_grad_norm or math.inf
        own = nn.utils.clip_grad_norm_(self.critic.parameters(), limit)
        if self.accelerator.scaler is None:
            self.check_finite(critic_gradient=own)
        self.add_metrics({"critic_grad_norm": own[None]})
        return norm

    def after_step(self) -> None:
        """Clears the critic's gradients."""
        super().after_step()
        self.critic.zero_grad()

    def save_extra(self, folder: Path) -> None:
        """Adds the critic to a checkpoint."""
        super().save_extra(folder)
        if self.accelerator.is_main_process:
            save_weights(trainable_weights(self.critic), folder / "critic")

    def load_extra(self, folder: Path) -> None:
        """Reads the critic from a checkpoint."""
        super().load_extra(folder)
        put_weights(self.critic, read_weights(self.critic, folder / "critic"))

    def _facts(self, peft_config: Any) -> dict[str, Any]:
        return super()._facts(peft_config) | {"critic": self.critic_fingerprint}


def _judge_model(judge: Judge | None, tokenizer: Any) -> PreTrainedModel | None:
    """The judge's model, if it scores and reads the policy's tokens."""
    model, own = getattr(judge, "model", None), getattr(judge, "tokenizer", None)
    if not isinstance(model, PreTrainedModel) or getattr(judge, "compares_only", False):
        return None
    return model if own is not None and reads_same_tokens(tokenizer, own) else None
