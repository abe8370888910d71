"""Dataset reset policy optimisation: PPO whose samples begin inside offline answers.

Chang, Zhan et al., arXiv 2404.08495. A sample is reset with a probability of its own to a part of
an offline answer, which the policy completes. The judge scores the whole answer; the tokens that
were forced train the critic and not the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from prefopt.data.tokenize import PromptedAnswers, PromptedPairs
from prefopt.errors import PrefoptError
from prefopt.rounds.resets import Resets
from prefopt.rounds.sampling import Sampler
from prefopt.trainers.ppo import PPOConfig, PPOTrainer
from prefopt.trainers.round_rows import Rows


@dataclass
class DRPOConfig(PPOConfig):
    """Keys of PPO and of resets; 1.0, no sample from the bare prompt, is the paper's main setting.

    The paper resets to human reference answers (``reset_column`` names their column).
    """

    reset_probability: float = field(
        default=1.0, metadata={"help": "That a sample begins inside an offline answer; 0 is PPO."}
    )
    reset_column: str = field(default="chosen", metadata={"help": "Column of the offline answers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.reset_probability <= 1:
            raise PrefoptError(
                f"reset_probability: found {self.reset_probability}, expected 0 to 1"
            )
        if self.reset_column == "prompt":
            raise PrefoptError("reset_column: found prompt, expected a column with answers")
        if self.offline_value_weight and self.reset_column != "chosen":
            raise PrefoptError(
                f"offline_value_weight: found {self.offline_value_weight} with reset_column="
                f"{self.reset_column}; the critic reads the answers of pairs, so set it to 0, or "
                "reset_column to chosen"
            )

    @property
    def rows(self) -> Rows:
        """Prompts with an offline answer; pairs where the critic reads both of theirs."""
        return "pairs" if self.offline_value_weight else "answers"


class DRPOTrainer(PPOTrainer):
    """PPO with resets; the arguments are those of :class:`prefopt.trainers.ppo.PPOTrainer`."""

    args: DRPOConfig
    config = DRPOConfig
    prompts: PromptedPairs | PromptedAnswers

    def make_sampler(self) -> Sampler:
        """With resets, unless none would ever take place."""
        sampler = super().make_sampler()
        if not self.args.reset_probability:
            return sampler
        resets = Resets(
            self.prompts.chosen_ids
            if isinstance(self.prompts, PromptedPairs)
            else self.prompts.completion_ids,
            self.args.reset_probability,
            self.processing_class,
            self.stop_token_ids,
        )
        return replace(sampler, resets=resets)
