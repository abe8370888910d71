"""What every run in rounds is told: its keys and its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.plan import PlannedRound, plan_rounds
from prefopt.trainers.base import TreeTrainerConfig
from prefopt.trainers.round_rows import Rows

# keys of transformers that samples of later rounds depend on
OPTIMISATION = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "num_train_epochs",
    "optim",
    "optim_args",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
}
ELSEWHERE = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping"}
NOT_IN_FACTS = {"rounds_dir", "log_probs_dir", "generation_batch_size"}
OPTIMIZER_STATES = ("fresh", "continue")


@dataclass
class RoundConfig(TreeTrainerConfig):
    """Keys of training in rounds; ``num_train_epochs`` is the passes over the rows of a round."""

    asks: ClassVar[tuple[str, ...]] = ("score", "prefer")  # the questions to the judge

    rounds: int | None = field(
        default=3, metadata={"help": "Rounds; null: as many as one pass over the prompts fills."}
    )
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "null: all prompts once, split evenly over the rounds."}
    )
    optimizer_state: str = field(
        default="fresh",
        metadata={"help": "Optimiser and schedule: fresh in every round | continue across rounds."},
    )
    prompts_per_shard: int = field(
        default=64, metadata={"help": "Prompts in a file of samples: what one process takes on."}
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Completions generated at a time."}
    )
    overlap: bool = field(
        default=False,
        metadata={"help": "Servers sample the next round meanwhile; samples are a round stale."},
    )
    rounds_dir: str | None = field(
        default=None, metadata={"help": "Where the rounds are kept; OUTPUT_DIR/rounds."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "steps | no | epoch: after every round."}
    )

    def __post_init__(self) -> None:
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise PrefoptError(
                f"optimizer_state: found {self.optimizer_state!r}, expected "
                f"{' or '.join(OPTIMIZER_STATES)}"
            )
        for name in ("prompts_per_shard", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.num_train_epochs <= 0:
            raise PrefoptError(f"num_train_epochs: found {self.num_train_epochs}, expected above 0")
        if self.save_strategy == "best":
            raise PrefoptError(
                "save_strategy: found best, of which rounds know nothing; expected epoch (after "
                "every round), steps or no"
            )
        self.ignore_data_skip = True  # where a run stands follows from its step and its rounds
        super().__post_init__()

    @property
    def rows(self) -> Rows:
        """What a row of data must hold."""
        return "prompts"

    @property
    def global_batch(self) -> int:
        """Rows of an optimiser step."""
        micro_batch = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return micro_batch * self.world_size

    @property
    def prompts_of_a_round(self) -> int | None:
        """Prompts in each round; None: one pass, split evenly over the rounds."""
        return self.prompts_per_round

    def rows_planned(self, prompts: Sequence[int], samples_per_prompt: int) -> list[int]:
        """The rows that each round trains on, as far as its prompts can say: one a prompt.

        Args:
            prompts: Of each round.
            samples_per_prompt: Drawn for each.
        """
        return list(prompts)

    def samples_drawn(self, samples_per_prompt: int) -> int:
        """Samples that are drawn for a prompt of which so many are asked for."""
        return samples_per_prompt

    def check_sampling(self, sampling: Sequence[SamplingSettings]) -> None:
        """Checks that the algorithm can use samples drawn like this.

        Raises:
            PrefoptError: It cannot.
        """
        raise NotImplementedError

    def plan(self, num_rows: int) -> list[PlannedRound]:
        """The rows of each round.

        Raises:
            PrefoptError: They cannot be dealt to rounds as asked.
        """
        return plan_rounds(
            num_rows,
            rounds=self.rounds,
            prompts_per_round=self.prompts_of_a_round,
            seed=self.seed,
            shuffle=self.train_sampling_strategy == "random",
        )


def settings_of(args: RoundConfig) -> dict[str, str]:
    """The keys that later rounds depend on, as text."""
    own = {f.name for f in fields(args)} - {f.name for f in fields(TrainingArguments)}
    names = sorted((own - NOT_IN_FACTS) | OPTIMISATION)
    if args.optimizer_state == "continue":  # the whole schedule depends on its length
        names.append("max_steps")
    return {name: str(getattr(args, name)) for name in names}


def adapter_facts(peft_config: Any) -> str:
    """What an adapter is, as the same text in every process; sets have no order of their own."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, set) else str(value)

    # where the base model lies says nothing, its weights are compared
    told = {k: v for k, v in peft_config.to_dict().items() if v is not None and k not in ELSEWHERE}
    return json.dumps(told, sort_keys=True, default=plain)


def schedule(args: RoundConfig, steps: int) -> Callable[[float], float]:
    """transformers' schedule over so many steps: from a step to the share of the peak rate.

    A warm-up begins one step further on than transformers', whose first step has a rate of 0: in a
    round of few steps that would be much, and in a round of one all of it.

    Raises:
        PrefoptError: The schedule asked for depends on more than the step.
    """
    warmup = args.get_warmup_steps(steps)
    skipped = min(warmup, 1)
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate or 1.0),  # lr_end is absolute
        warmup,
        steps + skipped,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise PrefoptError(
            f"lr_scheduler_type: {args.lr_scheduler_type} depends on more than the step; use "
            "cosine, linear, constant or another that does not"
        )
    share_of_peak = scheduler.lr_lambdas[0]
    return lambda step: share_of_peak(step + skipped)
