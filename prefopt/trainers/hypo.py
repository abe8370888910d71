"""HyPO: DPO on offline pairs, and a reverse KL measured on fresh samples of the policy.

Hybrid preference optimisation: Song, Swamy, Singh, Bagnell, Sun, arXiv 2406.01462. No reward model
is asked: the samples carry no labels. (Other work uses the name HyPO for something else.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prefopt.data.tokenize import PromptedPairs
from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.logprobs import token_log_probs_of
from prefopt.objectives import reverse_kl_loss
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.collect import CollectedSamples
from prefopt.rounds.store import json_lines
from prefopt.rounds.sums import write_summed
from prefopt.trainers.dpo import DPOConfig, check_columns, dpo_losses
from prefopt.trainers.pairs import pair_dataset
from prefopt.trainers.reference import reference_log_probs
from prefopt.trainers.round_rows import Rows
from prefopt.trainers.sample_rounds import (
    SampleRoundConfig,
    SampleRoundTrainer,
    sampled_log_probs,
)


@dataclass
class HyPOConfig(SampleRoundConfig, DPOConfig):
    """Keys of rounds of samples and of the DPO family.

    The method's numbers could not be verified; learning rate and ``kl_weight`` are our choice.
    """

    asks: ClassVar[tuple[str, ...]] = ()
    least_samples: ClassVar[int] = 2

    kl_weight: float = field(
        default=1e-4, metadata={"help": "lambda: weight of the KL of whole answers; 0 is DPO."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kl_weight >= 0:
            raise PrefoptError(f"kl_weight: found {self.kl_weight}, expected 0 or above")

    @property
    def rows(self) -> Rows:
        """Pairs."""
        return "pairs"

    def samples_drawn(self, samples_per_prompt: int) -> int:
        """Samples drawn for a prompt: none without a KL."""
        return samples_per_prompt if self.kl_weight else 0

    def check_sampling(self, sampling: Sequence[SamplingSettings]) -> None:
        """Without a KL there is nothing to sample."""
        if self.kl_weight:
            super().check_sampling(sampling)


class HyPOTrainer(SampleRoundTrainer):
    """Trains on pairs and on samples of their prompts, which share a tree.

    The arguments are those of :class:`prefopt.trainers.rounds.RoundTrainer`; the rows are
    preference pairs, and there is no judge.
    """

    args: HyPOConfig
    config = HyPOConfig
    prompts: PromptedPairs

    def __init__(
        self,
        model: nn.Module,
        args: HyPOConfig,
        train_dataset: PromptedPairs | Iterable[dict[str, Any]] | None,
        **kwargs: Any,
    ) -> None:
        self.new_adapter = kwargs.get("peft_config") is not None
        super().__init__(model, args, train_dataset, **kwargs)
        if not args.kl_weight:
            self.sampling, self.samples_per_prompt = [], 0
        self.pairs = pair_dataset(self.prompts)
        check_columns(args.loss_type, self.pairs, "train_dataset")

    def ask(self) -> None:
        """Nothing: the samples are not judged."""
        return None

    def offline_answers(self, row: int) -> list[list[int]]:
        """The chosen and the rejected answer."""
        return [self.prompts.chosen_ids[row], self.prompts.rejected_ids[row]]

    def before_training(self, resumed: bool) -> None:
        """Stores the reference log-probs of all pairs, as DPO does."""
        super().before_training(resumed)
        self.choose_layout_once(self.pairs.trees)
        self.pairs.columns["reference"] = reference_log_probs(
            self,
            self.pairs,
            self.fingerprint,
            adapter=self.new_adapter,
            resumed=resumed,
            temperature=self.temperature,
        )

    def collect(self, index: int, folder: Path) -> dict[str, float]:
        """Samples for the prompts of a round, if there is a KL to measure."""
        if self.sampling:
            return super().collect(index, folder)
        if self.accelerator.is_main_process and not self.is_collected(folder):
            count = len(self.plan[index].prompts)
            report = {"round": index, "prompts": count}
            write_summed(folder / "round.json", json_lines([report]))
        self.accelerator.wait_for_everyone()
        return {}

    def columns(
        self, index: int, trees: list[PromptTree], collected: CollectedSamples, moved: bool
    ) -> Mapping[str, Sequence[Any]]:
        """Labels, and the reference log-probs of pairs and samples."""
        rows = self.plan[index].prompts
        columns: dict[str, Sequence[Any]] = {
            name: [values[row] for row in rows] for name, values in self.pairs.columns.items()
        }
        if self.sampling:
            samples = [PromptTree(tree.prompt, tree.completions[2:]) for tree in trees]
            reference = self.stored("initial", index, samples, moved)
            columns["reference"] = [
                torch.cat(both) for both in zip(columns["reference"], reference, strict=True)
            ]
            columns["sampled"] = sampled_log_probs(collected, self.samples_per_prompt)
        return columns

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The DPO loss of each pair plus ``kl_weight`` times the surrogate of the KL."""
        trees: TreeBatch = inputs["trees"]
        token_log_probs = token_log_probs_of(model, trees, self.temperature)
        log_probs = trees.sum_per_completion(token_log_probs).view(trees.num_trees, -1)
        reference = inputs["reference"].view_as(log_probs)
        lengths = trees.lengths.view_as(log_probs)
        losses, metrics = dpo_losses(
            self.args,
            log_probs[:, :2].flatten(),
            lengths[:, :2].flatten(),
            reference=reference[:, :2].flatten(),
            p_chosen=inputs.get("p_chosen"),
        )
        metrics |= {"length/chosen": lengths[:, 0], "length/rejected": lengths[:, 1]}
        if not self.sampling:
            return losses, metrics
        own, own_reference = log_probs[:, 2:], reference[:, 2:]
        kl_losses = reverse_kl_loss(own, own_reference)
        drawn = torch.arange(trees.num_completions, device=own.device) % log_probs.shape[1] >= 2
        own_lengths = lengths[:, 2:].flatten()
        metrics |= self.sample_metrics(
            (own - own_reference).flatten(), token_log_probs[drawn[trees.owner]], own_lengths
        )
        metrics |= self.sampler_gap(own.flatten(), inputs["sampled"], own_lengths)
        return losses + self.args.kl_weight * kl_losses, metrics | {"dpo_loss": losses}
