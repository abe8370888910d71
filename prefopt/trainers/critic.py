"""A second model that is trained beside the policy, by the same steps: the critic of PPO.

transformers' loop knows one model. The critic's weights are groups of their own in its optimiser,
so that schedule, accumulation and checkpoints are shared; what the loop does to its model alone
(wrapping, clipping, clearing gradients, saving) is done for the critic here.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.data.tree import PromptTree
from prefopt.errors import PrefoptError
from prefopt.judge import Judge
from prefopt.models.critic import make_critic, reads_same_tokens
from prefopt.models.forward import enable_trees, supports_tree_attention
from prefopt.models.gathered import is_partitioned
from prefopt.models.layout_check import values_agree
from prefopt.rounds.weights import put_weights, read_weights, save_weights, trainable_weights
from prefopt.trainers.base import disable_dropout
from prefopt.trainers.reference import shared_fingerprint
from prefopt.trainers.sample_rounds import SampleRoundTrainer

logger = logging.getLogger(__name__)


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
        if any(map(is_partitioned, model.parameters())):  # of which no critic could be made
            raise _not_sharded(type(self).__name__, "ZeRO-3")
        if critic is None:
            judge_model = _judge_model(judge, kwargs.get("processing_class"))
            critic = make_critic(model, judge_model)
            begins = "the policy's trunk, values of 0" if judge_model is None else "the judge"
            logger.info("the critic begins as %s", begins)
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
            adapter.base_model_name_or_path = None  # the policy's
            adapter.task_type = "SEQ_CLS"  # for which the score head is trained beside the adapter
            self.critic = get_peft_model(critic, adapter)
        self.critic_wrapped: nn.Module = self.critic.to(self.args.device)

    def check_sharding(self) -> None:
        """Refuses sharded weights.

        Raises:
            PrefoptError: FSDP or DeepSpeed is on.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            found = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise _not_sharded(type(self).__name__, found)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Adds the critic's weights to the policy's, in groups with a rate of their own."""
        begun = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if begun:
            return optimizer
        rate = self.args.critic_learning_rate
        decaying = set(self.get_decay_parameter_names(self.critic))
        for decays in (True, False):
            group = {
                "params": [
                    parameter
                    for name, parameter in self.critic.named_parameters()
                    if parameter.requires_grad and (name in decaying) == decays
                ],
                "lr": self.args.learning_rate if rate is None else rate,
                "weight_decay": self.args.weight_decay if decays else 0.0,
            }
            optimizer.add_param_group(group)
        return optimizer

    def before_training(self, resumed: bool) -> None:
        """Wraps the critic as transformers has wrapped the policy: for autocast, for DDP."""
        super().before_training(resumed)
        self.critic_wrapped = self.accelerator.prepare_model(self.critic_wrapped)  # once only

    def choose_layout(self, trees: Sequence[PromptTree]) -> None:
        """Trees only where the critic's numbers agree on them too."""
        super().choose_layout(trees)
        if self.args.layout == "auto" and self.layout == "tree":
            self.critic_wrapped.eval()
            first = trees[: 4 * self.args.train_batch_size]
            able = supports_tree_attention(self.critic)
            if not (able and values_agree(self.critic_wrapped, first, self.compute_dtype)):
                logger.warning("the critic's values cannot be read off trees: layout 'separate'")
                self.layout = "separate"

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
        save_weights(self.critic, trainable_weights(self.critic), folder / "critic")

    def load_extra(self, folder: Path) -> None:
        """Reads the critic from a checkpoint."""
        super().load_extra(folder)
        put_weights(self.critic, read_weights(self.critic, folder / "critic"))

    def _facts(self, peft_config: Any) -> dict[str, Any]:
        return super()._facts(peft_config) | {"critic": self.critic_fingerprint}


def _not_sharded(name: str, found: str) -> PrefoptError:
    return PrefoptError(
        f"{name}: found {found}, which shards one model, but this algorithm trains a critic beside "
        "the policy; use DDP, with a LoRA adapter where memory is short, or an algorithm without a "
        "critic"
    )


def _judge_model(judge: Judge | None, tokenizer: Any) -> PreTrainedModel | None:
    """The judge's model, if it scores and reads the policy's tokens."""
    own = getattr(judge, "tokenizer", None)
    compares = getattr(judge, "compares_only", False)
    if compares or own is None or not reads_same_tokens(tokenizer, own):
        return None
    load = getattr(judge, "load_model", None)  # a judge that is served has no torch module at hand
    model = load() if load else getattr(judge, "model", None)
    return model if isinstance(model, PreTrainedModel) else None
