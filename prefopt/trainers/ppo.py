"""PPO on answers: a clipped policy gradient with a critic, and a KL to the initial policy.

Schulman et al., arXiv 1707.06347; defaults are those of the code of dataset reset policy
optimisation (Chang, Zhan et al., arXiv 2404.08495), of which this is the case without resets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from prefopt.data.template import stop_token_ids
from prefopt.data.tokenize import PromptedPairs
from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.critic import token_values
from prefopt.models.logprobs import token_log_probs_of
from prefopt.objectives import clipped_value_loss, ppo_policy_loss
from prefopt.rollout.engine import make_completion
from prefopt.rounds.collect import Ask, CollectedSamples, Collector
from prefopt.rounds.judging import Judgement, score_samples
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.store import Sample
from prefopt.trainers.critic import CriticTrainer
from prefopt.trainers.episodes import Episode, TokenReads, episode_columns
from prefopt.trainers.round_rows import Rows
from prefopt.trainers.sample_rounds import SampleRoundConfig


@dataclass
class PPOConfig(SampleRoundConfig):
    """Keys of PPO; ``num_train_epochs`` is the passes over the samples of a round.

    Learning rate, schedule, passes, clips, ``vf_coef``, ``kl_coef``, ``gae_lambda``, whitening and
    the score of unfinished answers are the values of the code of arXiv 2404.08495.
    """

    asks: ClassVar[tuple[str, ...]] = ("score",)

    learning_rate: float = field(default=3e-6, metadata={"help": "Peak learning rate."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic; null: the policy's."}
    )
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule."})
    num_train_epochs: float = field(
        default=4.0, metadata={"help": "Passes over the samples of a round."}
    )
    kl_coef: float = field(
        default=0.05, metadata={"help": "Reward lost per nat of log-ratio to the initial policy."}
    )
    clip: float = field(default=0.2, metadata={"help": "Of the policy's ratio, around 1."})
    value_clip: float = field(default=0.2, metadata={"help": "Of the values, around the old ones."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gae_gamma: float = field(default=1.0, metadata={"help": "Discount of a token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Of generalised advantages."})
    whiten_rewards: bool = field(
        default=True, metadata={"help": "Divide a round's token rewards by their root mean square."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Give a round's advantages mean 0 and variance 1."}
    )
    missing_eos_score: float | None = field(
        default=-1.0, metadata={"help": "Score of an answer that did not end; null: the judge's."}
    )
    mask_padding: bool = field(
        default=True,
        metadata={"help": "false: answers are padded and padding counts, as in DR-PO's code."},
    )
    critic_warmup_rounds: int = field(
        default=0, metadata={"help": "First rounds, which train the critic alone."}
    )
    offline_value_weight: float = field(
        default=0.0, metadata={"help": "Weight of the offline answers in the value loss."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("kl_coef", "vf_coef", "critic_warmup_rounds", "offline_value_weight")
        for name in (*weights, "critic_learning_rate"):
            if not (getattr(self, name) or 0) >= 0:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected 0 or above")
        for name in ("clip", "value_clip"):
            if not getattr(self, name) > 0:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected above 0")
        for name in ("gae_gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected 0 to 1")

    @property
    def rows(self) -> Rows:
        """Prompts; pairs where the critic reads their answers."""
        return "pairs" if self.offline_value_weight else "prompts"

    def plan(self, num_rows: int) -> list[PlannedRound]:
        """The rows of each round.

        Raises:
            PrefoptError: They cannot be dealt to rounds as asked, or none would train the policy.
        """
        planned = super().plan(num_rows)
        if self.critic_warmup_rounds >= len(planned):
            raise PrefoptError(
                f"critic_warmup_rounds: found {self.critic_warmup_rounds} of {len(planned)} rounds,"
                " which leaves none to train the policy in; lower it"
            )
        return planned


class PPOTrainer(CriticTrainer):
    """Trains on scored samples; see :class:`prefopt.trainers.critic.CriticTrainer`."""

    args: PPOConfig
    config = PPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warmup = sum(self.planned_steps[: self.args.critic_warmup_rounds])
        if self.args.max_steps <= warmup:
            raise PrefoptError(
                f"max_steps: found {self.args.max_steps}, all of them in critic_warmup_rounds="
                f"{self.args.critic_warmup_rounds}, which take {warmup} steps and train no policy"
            )

    # --- what a round holds ----------------------------------------------------------------------

    def ask(self) -> Ask:
        """A score for each sample."""
        judge = self.judge
        assert judge is not None
        return lambda prompts, samples, keys: [
            Judgement(scores, []) for scores in score_samples(judge, prompts, samples, keys)
        ]

    def make_collector(self) -> Collector:
        """Where the critic reads offline answers, the judge scores them too."""
        collector = super().make_collector()
        if not self.args.offline_value_weight:
            return collector
        return replace(collector, judged_too=self._offline_texts)

    def _offline_texts(self, row: int) -> list[str]:
        answers, stop = self.offline_answers(row), self.stop_token_ids
        return [make_completion(ids, stop, self.processing_class).text for ids in answers]

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a completion."""
        config: Any = self.policy
        return stop_token_ids(self.processing_class, config.generation_config)

    def offline_answers(self, row: int) -> list[list[int]]:
        """The answers of a pair, where the critic reads them."""
        if not isinstance(self.prompts, PromptedPairs) or not self.args.offline_value_weight:
            return []
        return [self.prompts.chosen_ids[row], self.prompts.rejected_ids[row]]

    def make_tree(self, row: int, samples: Sequence[Sample]) -> PromptTree:
        """A row's prompt with its answers, which are padded if the padding is to count."""
        tree = super().make_tree(row, samples)
        if self.args.mask_padding:
            return tree
        tokenizer = self.processing_class
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        offline = len(self.offline_answers(row))
        padded = [
            [*ids, *[pad] * (self.limit - len(ids))] if number >= offline else ids
            for number, ids in enumerate(tree.completions)
        ]
        return PromptTree(tree.prompt, padded)

    @property
    def limit(self) -> int:
        """The most tokens of an answer."""
        return max(part.max_new_tokens for part in self.sampling)

    def episodes(self, tree: PromptTree, samples: Sequence[Sample], scores: Any) -> list[Episode]:
        """What is known of each answer on a tree: the offline ones, then the samples."""
        count, args = self.samples_per_prompt, self.args
        offline = len(tree.completions) - count
        found = [
            Episode(len(ids), score, offline=True)
            for ids, score in zip(tree.completions[:offline], scores[count:], strict=True)
        ]
        for sample, score in zip(samples, scores[:count], strict=True):
            answer = sample.completion
            ended = answer.finish_reason == "stop"
            if not args.mask_padding:  # DR-PO's code looks for padding after the answer
                ended = ended and len(answer.token_ids) < self.limit
            if not ended and args.missing_eos_score is not None:
                score = args.missing_eos_score
            found.append(Episode(len(answer.token_ids), score, sample.forced, answer.log_prob))
        return found

    def columns(
        self, index: int, trees: list[PromptTree], collected: CollectedSamples, moved: bool
    ) -> Mapping[str, Sequence[Any]]:
        """Numbers of every token: old log-probs and values, advantages and returns, masks."""
        args, sizes = self.args, [sum(map(len, tree.completions)) for tree in trees]
        log_probs = partial(token_log_probs_of, temperature=self.temperature)
        stored = partial(self.stored, index=index, trees=trees, moved=moved, sizes=sizes)
        reads = TokenReads(
            policy=stored("policy", read=log_probs),
            reference=stored("initial", read=log_probs),
            values=stored("critic", read=token_values, model=self.critic_wrapped),
        )
        episodes = chain.from_iterable(
            self.episodes(tree, collected.samples[p], collected.judgements[p].scores)
            for p, tree in enumerate(trees)
        )
        # facts are logged where the round begins
        columns, self.round_facts = episode_columns(trees, list(episodes), reads, args)
        return columns

    def begin_training(self, index: int) -> dict[str, float]:
        """What is known of a round as it begins."""
        return self.round_facts

    def batch_columns(self, rows: np.ndarray) -> dict[str, Any]:
        """Tokens a tree that the losses divide by: those of the whole global batch."""
        return {
            f"mean_{name}": sum(self.dataset.columns[name][row].sum().item() for row in rows)
            / len(rows)
            for name in ("own", "sampled", "offline")
        }

    # --- the loss --------------------------------------------------------------------------------

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss over its own tokens and the critic's over all, each a mean."""
        trees: TreeBatch = inputs["trees"]
        losses, metrics = self._value_losses(trees, inputs)
        metrics["staleness"] = torch.full_like(losses, float(self.staleness))
        assert self.current is not None
        if self.current.index < self.args.critic_warmup_rounds:
            return losses, metrics  # without a graph of the policy its optimiser passes it over
        policy_losses, more = self._policy_losses(model, trees, inputs)
        return losses + policy_losses, metrics | more

    def _value_losses(
        self, trees: TreeBatch, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        args = self.args
        self.critic_wrapped.train()
        values = token_values(self.critic_wrapped, trees)
        on_policy = clipped_value_loss(
            values, inputs["values"], inputs["returns"], clip=args.value_clip
        )
        losses = _per_tree(on_policy * inputs["sampled"], trees) / inputs["mean_sampled"]
        metrics = {"value_loss": losses}
        if args.offline_value_weight:
            errors = 0.5 * (values - inputs["returns"]) ** 2 * inputs["offline"]
            offline = _per_tree(errors, trees) / inputs["mean_offline"]
            losses = losses + args.offline_value_weight * offline
            metrics["value_loss/offline"] = offline
        return args.vf_coef * losses, metrics

    def _policy_losses(
        self, model: nn.Module, trees: TreeBatch, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own, old = inputs["own"], inputs["old"]
        log_probs = token_log_probs_of(model, trees, self.temperature)
        clipped = ppo_policy_loss(log_probs, old, inputs["advantages"], clip=self.args.clip)
        losses = _per_tree(clipped * own, trees) / inputs["mean_own"]
        outside = ((log_probs - old).exp() - 1).abs() > self.args.clip
        return losses, {"policy_loss": losses, "clip_fraction": outside[own].float()}


def _per_tree(token_values: Tensor, trees: TreeBatch) -> Tensor:
    """Adds up a value per token, [tokens], to one per tree, [trees]."""
    sums = token_values.new_zeros(trees.num_trees)
    return sums.index_add(0, trees.tree_of[trees.owner], token_values)
