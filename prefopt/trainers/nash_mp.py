"""Nash-MP: self-play held near the reference and near a target that moves slowly.

After Tiapkin et al., arXiv 2505.19731: mirror prox on the preference game. Of its practical form
for language models only the idea could be verified; what is published and what is a reconstruction
is said in docs/nash_mp.md.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prefopt.data.tree import PromptTree, TreeBatch
from prefopt.errors import PrefoptError
from prefopt.models.logprobs import token_log_probs_of
from prefopt.objectives import nash_mp_loss
from prefopt.rounds.collect import Ask, CollectedSamples
from prefopt.rounds.judging import compare_all, win_rates
from prefopt.rounds.plan import PlannedRound
from prefopt.rounds.sampling import Sampler
from prefopt.rounds.weights import follow, put_weights, trainable_weights
from prefopt.trainers.players import player
from prefopt.trainers.sample_rounds import (
    SampleRoundConfig,
    SampleRoundTrainer,
    sampled_log_probs,
)
from prefopt.trainers.sharding import shards_weights

logger = logging.getLogger(__name__)

MODES = ("ema", "mirror_prox")


@dataclass
class NashMPConfig(SampleRoundConfig):
    """Keys of Nash-MP; all numbers are our choice.

    ``prox`` is beta / eta in the paper's letters: 1/2 is its step ``eta = 2 beta``.
    """

    least_samples: ClassVar[int] = 2

    beta: float = field(default=0.1, metadata={"help": "Weight of the KL to the reference."})
    prox: float = field(default=0.5, metadata={"help": "Weight of the KL to the target."})
    kappa: float = field(
        default=0.1,
        metadata={"help": "ema: how far the target follows in a step; 1: no target, 0: it stays."},
    )
    mode: str = field(
        default="ema",
        metadata={"help": "ema: self-play, moving target | mirror_prox: two phases, half step."},
    )
    phase_rounds: int = field(
        default=10, metadata={"help": "mirror_prox: rounds in each of the two phases of a step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "prox"):
            if not getattr(self, name) >= 0:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected 0 or above")
        if not 0 <= self.kappa <= 1:
            raise PrefoptError(f"kappa: found {self.kappa}, expected a rate from 0 to 1")
        if self.mode not in MODES:
            raise PrefoptError(f"mode: found {self.mode!r}, expected {' or '.join(MODES)}")
        if self.phase_rounds < 1:
            raise PrefoptError(f"phase_rounds: found {self.phase_rounds}, expected 1 or more")

    def samples_drawn(self, samples_per_prompt: int) -> int:
        """Samples drawn for a prompt: with two phases, the opponent's as well."""
        return samples_per_prompt * (2 if self.mode == "mirror_prox" else 1)

    def plan(self, num_rows: int) -> list[PlannedRound]:
        """The prompts of each round; two phases are whole, so that no run ends in a half step.

        Raises:
            PrefoptError: They cannot be dealt to rounds as asked.
        """
        planned = super().plan(num_rows)
        rest = len(planned) % (2 * self.phase_rounds) if self.mode == "mirror_prox" else 0
        if rest and (self.rounds is not None or rest == len(planned)):
            raise PrefoptError(
                f"rounds: found {len(planned)}, expected a multiple of 2 x phase_rounds = "
                f"{2 * self.phase_rounds}, a whole step of mirror prox; change one of the two"
            )
        return planned[: len(planned) - rest]


class NashMPTrainer(SampleRoundTrainer):
    """Trains on comparisons of its samples with each other, or with those of an opponent.

    The arguments are those of :class:`prefopt.trainers.rounds.RoundTrainer`.
    """

    args: NashMPConfig
    config = NashMPConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.opponent = "target"  # whose weights they are, in the phase that is on
        if self.two_phases:
            self._check_whole_steps()

    def check_sharding(self) -> None:
        """Refuses two phases where weights are sharded.

        Raises:
            PrefoptError: They are, or rounds cannot work with them for another reason.
        """
        super().check_sharding()
        found = "DeepSpeed" if self.is_deepspeed_enabled else shards_weights(self)
        if self.two_phases and found:
            raise PrefoptError(
                f"mode: found mirror_prox with {found}, but a step that goes back to where it "
                "began needs weights that are whole and, in half precision, DeepSpeed's masters; "
                "use mode ema, or DDP"
            )

    @property
    def two_phases(self) -> bool:
        """Whether this is mirror prox."""
        return self.args.mode == "mirror_prox"

    @property
    def keeps(self) -> tuple[str, ...]:
        """The weights that are kept beside the initial ones."""
        if self.two_phases:
            return ("target", "half")
        # at kappa = 0 the target is the initial policy
        return ("target",) if self.prox and self.args.kappa else ()

    @property
    def prox(self) -> float:
        """The weight of the target; at kappa = 1 it is the policy itself and has no pull."""
        return 0.0 if self.args.mode == "ema" and self.args.kappa == 1 else self.args.prox

    def _check_whole_steps(self) -> None:
        """Says how many rounds are left out; refuses a limit that would end in a half step."""
        args, cycle = self.args, 2 * self.args.phase_rounds
        left_out = len(SampleRoundConfig.plan(args, len(self.prompts))) - len(self.plan)
        if left_out:
            logger.info("rounds left out, since they would end in a half step: %d", left_out)
        ends = list(accumulate(self.planned_steps))[cycle - 1 :: cycle]
        if args.max_steps not in ends:
            raise PrefoptError(
                f"max_steps: found {args.max_steps}, which ends in a half step of mirror prox; "
                f"whole steps end after {', '.join(map(str, ends[:3]))}"
                f"{', ...' if len(ends) > 3 else ''} optimiser steps"
            )

    @property
    def opponents(self) -> int:
        """Samples a prompt that are an opponent's."""
        return self.samples_per_prompt if self.two_phases else 0

    def ask(self) -> Ask:
        """To compare every two samples of a prompt, or every sample with every opponent's."""
        judge, opponents = self.judge, self.opponents
        assert judge is not None
        return lambda prompts, samples, keys: compare_all(
            judge, prompts, samples, keys, opponents=opponents
        )

    def make_sampler(self) -> Sampler:
        """With two phases, an opponent samples as well."""
        sampler = super().make_sampler()
        if not self.two_phases:
            return sampler
        opponent = player(self, self.engine, lambda: self.weights_of(self.opponent))
        return replace(sampler, players=[*sampler.players, opponent])

    def before_sampling(self, index: int) -> None:
        """Mirror prox: keeps the policy as a phase begins, and has both begin from one point."""
        if not self.two_phases:
            return
        phase, within = divmod(index % (2 * self.args.phase_rounds), self.args.phase_rounds)
        self.opponent = ("target", "half")[phase]
        if within:
            return
        self.between_steps = True
        self.kept[self.opponent] = trainable_weights(self.policy)
        if phase == 1:
            put_weights(self.policy, self.kept["target"])
        self.optimizer.state.clear()

    def after_step(self) -> None:
        """The target follows the policy."""
        if self.keeps and not self.two_phases:
            follow(self.kept["target"], self.policy, self.args.kappa)

    def columns(
        self, index: int, trees: list[PromptTree], collected: CollectedSamples, moved: bool
    ) -> Mapping[str, Sequence[Any]]:
        """Win rates, and the log-probs of samples under reference and target."""
        count, opponents = self.samples_per_prompt, self.opponents
        columns: dict[str, Sequence[Any]] = {
            "reference": self.stored("initial", index, trees, moved),
            "sampled": sampled_log_probs(collected, count),
            "win_rates": [
                torch.tensor(win_rates(judgement, count + opponents, opponents=opponents))
                for _, judgement in sorted(collected.judgements.items())
            ],
        }
        if self.prox and "target" in self.keeps:
            columns["target"] = self.stored("target", index, trees, moved)
        return columns

    def tree_losses(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate whose gradient is that of the game; its value says nothing."""
        trees: TreeBatch = inputs["trees"]
        token_log_probs = token_log_probs_of(model, trees, self.temperature)
        log_probs = trees.sum_per_completion(token_log_probs)
        reference, samples = inputs["reference"], (trees.num_trees, -1)
        target = inputs.get("target", reference)
        losses = nash_mp_loss(
            log_probs.view(samples),
            reference.view(samples),
            target.view(samples),
            inputs["win_rates"].view(samples),
            beta=self.args.beta,
            prox=self.prox,
        )
        metrics = self.sample_metrics(log_probs - reference, token_log_probs, trees.lengths)
        metrics |= self.sampler_gap(log_probs, inputs["sampled"], trees.lengths)
        if self.prox:
            metrics["kl_target"] = log_probs - target
        if self.two_phases:
            metrics["judge/win_rate"] = inputs["win_rates"]
        return losses, metrics
