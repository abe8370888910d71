"""Training in small rounds on samples: a row is a prompt with all its samples, on one tree.

The base of the algorithms that follow a gradient of the policy's own samples. By default a round is
one global batch, so that every step is taken on samples of the newest policy.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.logprobs import sequence_log_probs
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.collect import (
    CollectedSamples,
    collect_samples,
    first_drawing,
    read_drawing,
    samples_are_collected,
)
from prefopt.rounds.store import Sample, round_folder
from prefopt.rounds.weights import (
    Weights,
    exchanged,
    read_weights,
    save_weights,
    trainable_weights,
)
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.reference import stored_log_probs
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.rounds import OpenRound, RoundTrainer

logger = logging.getLogger(__name__)


@dataclass
class SampleRoundConfig(RoundConfig):
    """Keys of rounds of samples."""

    least_samples: ClassVar[int] = 1  # a prompt

    rounds: int | None = field(
        default=None, metadata={"help": "Rounds; null: as many as one pass over the rows fills."}
    )
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "null: steps_per_round global batches."}
    )
    steps_per_round: int = field(
        default=1, metadata={"help": "Optimiser steps in a pass over a round's samples."}
    )
    optimizer_state: str = field(
        default="continue",
        metadata={"help": "Optimiser and schedule: continue across rounds | fresh in every round."},
    )
    save_strategy: str = field(
        default="steps", metadata={"help": "steps | no | epoch: after every round."}
    )

    def __post_init__(self) -> None:
        if self.steps_per_round < 1:
            raise PrefoptError(f"steps_per_round: found {self.steps_per_round}, expected 1 or more")
        if self.overlap:
            raise PrefoptError(
                "overlap: found true, but this algorithm follows a gradient of the policy's own "
                "samples, which stale ones would bias; use online_dpo or inpo, or set it to false"
            )
        super().__post_init__()

    @property
    def prompts_of_a_round(self) -> int:
        """Prompts in each round."""
        if self.prompts_per_round is None:
            return self.steps_per_round * self.global_batch
        return self.prompts_per_round

    def check_sampling(self, sampling: Sequence[SamplingSettings]) -> None:
        """Checks that samples drawn like this are samples of the policy that is trained.

        Raises:
            PrefoptError: Something is cut off, temperatures differ, or there are too few samples.
        """
        for part in sampling:
            if part.temperature == 0 or part.temperature != sampling[0].temperature:
                raise PrefoptError(
                    f"rollout.temperature: found {part.temperature}, expected the same value above "
                    "0 for all samples: the policy that is trained is the one that samples"
                )
            if part.top_p != 1 or part.top_k != 0:
                raise PrefoptError(
                    f"rollout: found top_p={part.top_p} and top_k={part.top_k}, expected 1 and 0: "
                    "the gradient is that of whole distributions, and samples with something cut "
                    "off would bias it"
                )
        samples = sum(part.samples_per_prompt for part in sampling)
        if samples < self.least_samples:
            raise PrefoptError(
                f"rollout.samples_per_prompt: found {samples}, expected at least "
                f"{self.least_samples}: each is measured against the prompt's others"
            )


class SampleRoundTrainer(RoundTrainer):
    """Base of the trainers on samples; an algorithm adds columns and implements ``tree_losses``.

    The log-probs of the policy and of frozen models are those at the sampling temperature. Weights
    that an algorithm keeps beside the policy's (``kept``) are in memory, and in checkpoints.

    The arguments are those of :class:`prefopt.trainers.rounds.RoundTrainer`.
    """

    args: SampleRoundConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, Weights] = {}

    @property
    def temperature(self) -> float:
        """Of the policy that is trained; without samples nothing says other than 1."""
        return self.sampling[0].temperature if self.sampling else 1.0

    @property
    def uses_initial_weights(self) -> bool:
        """The reference of the samples."""
        return bool(self.sampling)

    # --- what an algorithm says ------------------------------------------------------------------

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names of the weights that are kept beside the initial ones."""
        return ()

    def offline_answers(self, row: int) -> list[list[int]]:
        """Token ids of a row's offline answers that stand in its tree before the samples."""
        return []

    def columns(
        self, index: int, trees: list[PromptTree], collected: CollectedSamples, moved: bool
    ) -> Mapping[str, Sequence[Any]]:
        """What the loss needs to know of each tree of a round."""
        raise NotImplementedError

    # --- a round ---------------------------------------------------------------------------------

    def before_training(self, resumed: bool) -> None:
        """Puts the weights in place that the loss needs beside the policy's."""
        super().before_training(resumed)
        if not resumed:
            self.kept = {name: trainable_weights(self.policy) for name in self.keeps}
        if self.uses_initial_weights:
            self.kept["initial"] = read_weights(self.policy, self.initial_weights)

    def save_extra(self, folder: Path) -> None:
        """Adds the kept weights to a checkpoint."""
        for name in self.keeps:
            save_weights(self.policy, self.kept[name], folder / "kept" / name)

    def load_extra(self, folder: Path) -> None:
        """Reads the kept weights from a checkpoint."""
        for name in self.keeps:
            self.kept[name] = read_weights(self.policy, folder / "kept" / name)

    def weights_of(self, name: str) -> AbstractContextManager[None]:
        """The policy with weights that are kept."""
        return exchanged(self.policy, self.kept[name])

    def is_collected(self, folder: Path) -> bool:
        """Whether a round's samples are on disk."""
        return samples_are_collected(folder)

    def collect(self, index: int, folder: Path) -> dict[str, float]:
        """Brings the samples and judgements of a round to disk."""
        return collect_samples(
            self.collector,
            folder,
            index,
            self.plan[index],
            progress=partial(self.progress, index),
        )

    def rows_of_round(self, index: int) -> int:
        """Every prompt of a round is a row."""
        return len(self.plan[index].prompts)

    def round_dataset(self, index: int, moved: bool) -> TreeDataset:
        """A tree a prompt: its offline answers, then its samples."""
        collected = CollectedSamples({row: [] for row in range(self.rows_of_round(index))}, {})
        if self.sampling:
            folder = round_folder(self.rounds_dir, index)
            drawing = first_drawing(self.collector, folder, index, self.plan[index])
            collected = read_drawing(self.collector, drawing)
        trees = [
            self.make_tree(row, collected.samples[position][: self.samples_per_prompt])
            for position, row in enumerate(self.plan[index].prompts)
        ]
        self.choose_layout_once(trees)
        return TreeDataset(trees, self.columns(index, trees, collected, moved))

    def make_tree(self, row: int, samples: Sequence[Sample]) -> PromptTree:
        """A row's prompt with its offline answers and its samples."""
        answers = [sample.completion.token_ids for sample in samples]
        return PromptTree(self.prompts.prompt_ids[row], self.offline_answers(row) + answers)

    def stored(
        self, name: str, index: int, trees: Sequence[PromptTree], moved: bool, **options: Any
    ) -> list[Tensor]:
        """Log-probs of a round under the policy as the round began, or under kept weights.

        Args:
            name: ``policy``, ``initial``, a name of ``keeps``, or that of a model of its own.
            index: Number of the round.
            trees: What is read.
            moved: Whether weights have moved since the round began.
            **options: As for :func:`prefopt.trainers.reference.stored_log_probs`; by default the
                sum of each completion is read.
        """
        read = partial(sequence_log_probs, temperature=self.temperature)
        return stored_log_probs(
            self,
            trees,
            round_folder(self.rounds_dir, index) / "log_probs" / name,
            weights=self.weights_of(name) if name in self.kept else nullcontext(),
            moved=moved and name != "initial",
            **{"read": read} | options,
        )

    # --- metrics ---------------------------------------------------------------------------------

    def announce(self, opened: OpenRound, facts: dict[str, Any]) -> None:
        """Says what the first round is; averages the facts of every round into the log."""
        if opened.index == 0:
            logger.info(
                "%d rounds of %d prompts x %d samples, %d step(s) each; optimiser: %s; "
                "temperature %s",
                len(self.plan),
                len(self.plan[0].prompts),
                self.args.samples_drawn(self.samples_per_prompt),
                opened.steps,
                self.args.optimizer_state,
                self.temperature,
            )
        counts = ("round", "prompts", "samples")
        self.add_metrics({k: torch.tensor([v]) for k, v in facts.items() if k not in counts})

    @property
    def staleness(self) -> int:
        """Optimiser steps since the samples were drawn."""
        assert self.current is not None
        return self.state.global_step - self.current.start

    def sample_metrics(
        self, ratios: Tensor, token_log_probs: Tensor, lengths: Tensor
    ) -> dict[str, Tensor]:
        """What all algorithms say of their samples, over real tokens of the policy's own.

        Args:
            ratios: lp - rf of each sample, [samples], in nats: their mean estimates the KL of the
                policy from the initial one.
            token_log_probs: The policy's, of each token it drew, [tokens]: minus their mean
                estimates the entropy of a token, in nats.
            lengths: Tokens of each sample, [samples].
        """
        return {
            "kl": ratios,
            "entropy": -token_log_probs,
            "length/mean": lengths.float(),
            "staleness": torch.full_like(ratios, float(self.staleness)),
        }

    def sampler_gap(self, log_probs: Tensor, sampled: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """By how much sampler and trainer disagree on fresh samples, in nats a token, [samples].

        Args:
            log_probs: Of each sample by the trainer, [samples].
            sampled: Of each sample by what drew it, [samples]; NaN where it does not say.
            lengths: Tokens of each sample, [samples].
        """
        if self.staleness:
            return {}
        gaps = (log_probs.detach() - sampled).abs() / lengths
        return {"sampler_gap": gaps[sampled.isfinite()]}

    def length_metrics(self, trees: TreeBatch) -> dict[str, Tensor]:
        """None of the base's: the completions of a tree are not a pair."""
        return {}


def sampled_log_probs(collected: CollectedSamples, count: int) -> list[Tensor]:
    """What the sampler said of the first ``count`` samples of each prompt, [count] each."""
    return [
        torch.tensor([sample.completion.log_prob for sample in group[:count]])
        for _, group in sorted(collected.samples.items())
    ]
