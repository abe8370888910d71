"""What a run in rounds is told: its keys, its prompts, its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from prefopt.data.rows import parse_prompt, validate
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import TokenizedPrompts, tokenize_prompts
from prefopt.errors import PrefoptError
from prefopt.rounds.pairing import PairingSettings
from prefopt.trainers.base import TreeTrainerConfig

CHOICES = {
    "initial_policy": ("previous", "initial"),
    "reference": ("initial", "previous"),
    "data_window": ("this_round", "all_so_far"),
    "optimizer_state": ("fresh", "continue"),
}


@dataclass
class RoundConfig(TreeTrainerConfig):
    """Keys of training in rounds; ``num_train_epochs`` is the passes over the pairs of a round.

    Defaults are those of the RLHF Workflow paper's implementation: train on from the last policy,
    on the newest data only, against the initial policy, with a new schedule in every round.
    """

    rounds: int | None = field(
        default=3, metadata={"help": "Rounds; null: as many as one pass over the prompts fills."}
    )
    prompts_per_round: int | None = field(
        default=None, metadata={"help": "null: all prompts once, split evenly over the rounds."}
    )
    initial_policy: str = field(
        default="previous", metadata={"help": "Weights a round trains on from: previous | initial."}
    )
    reference: str = field(
        default="initial", metadata={"help": "Reference of the loss: initial | previous policy."}
    )
    data_window: str = field(
        default="this_round", metadata={"help": "Pairs to train on: this_round | all_so_far."}
    )
    optimizer_state: str = field(
        default="fresh",
        metadata={"help": "Optimiser and schedule: fresh in every round | continue across rounds."},
    )
    pairing: str = field(
        default="best_worst",
        metadata={"help": "best_worst | best_random | tournament | independent."},
    )
    length_penalty: float = field(
        default=0.0, metadata={"help": "Score per character, subtracted before samples are paired."}
    )
    ties: str = field(
        default="drop", metadata={"help": "Pairs the judge finds equal: drop | keep | resample."}
    )
    redraws: int = field(
        default=2, metadata={"help": "With ties=resample: new samples for a prompt, at most."}
    )
    soft_labels: bool = field(
        default=False, metadata={"help": "Label with the judge's probability instead of 1."}
    )
    prompts_per_shard: int = field(
        default=64, metadata={"help": "Prompts in a file of samples: what one process takes on."}
    )
    generation_batch_size: int = field(
        default=64, metadata={"help": "Completions generated at a time."}
    )
    rounds_dir: str | None = field(
        default=None, metadata={"help": "Where the rounds are kept; OUTPUT_DIR/rounds."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "steps | no | epoch: after every round."}
    )

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise PrefoptError(
                    f"{name}: found {getattr(self, name)!r}, expected {' or '.join(choices)}"
                )
        for name in ("prompts_per_shard", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise PrefoptError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.redraws < 0 or self.num_train_epochs <= 0:
            raise PrefoptError("expected redraws of 0 or more and num_train_epochs above 0")
        self.pairing_settings()
        self.ignore_data_skip = True  # where a run stands follows from its step and its rounds
        super().__post_init__()

    def pairing_settings(self) -> PairingSettings:
        """The keys on pairing, together."""
        return PairingSettings(self.pairing, self.length_penalty, self.ties, self.soft_labels)


def prompt_rows(
    args: RoundConfig,
    rows: TokenizedPrompts | Iterable[dict[str, Any]],
    tokenizer: Any,
    max_new_tokens: int,
) -> TokenizedPrompts:
    """The prompts to sample for, each once; those without room for a completion are left out.

    Args:
        args: The limits on lengths.
        rows: Rows with a prompt (docs/data.md), or prompts that are tokenised already.
        tokenizer: The policy's.
        max_new_tokens: The longest completion.

    Raises:
        PrefoptError: A row is wrong, or no prompt is short enough.
    """
    if isinstance(rows, TokenizedPrompts):
        return rows
    located = ((f"train_dataset:{i}", row) for i, row in enumerate(rows, start=1))
    prompts, _ = validate(located, parse_prompt)
    check_tokenizer(tokenizer, conversational=not isinstance(prompts[0], str))
    limit = prompt_limit(args.max_prompt_length, args.max_length, max_new_tokens)
    return tokenize_prompts(prompts, tokenizer, max_prompt_length=limit, distinct=True)


def prompt_limit(
    max_prompt_length: int | None, max_length: int | None, max_new_tokens: int
) -> int | None:
    """The longest prompt, in tokens, that leaves room for a completion; None is no limit."""
    room = None if max_length is None else max_length - max_new_tokens
    return min((n for n in (max_prompt_length, room) if n is not None), default=None)


def schedule(args: RoundConfig, steps: int) -> Callable[[float], float]:
    """transformers' schedule over so many steps: from a step to the share of the peak rate.

    Raises:
        PrefoptError: The schedule asked for depends on more than the step.
    """
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        args.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        raise PrefoptError(
            f"lr_scheduler_type: {args.lr_scheduler_type} depends on more than the step; use "
            "cosine, linear, constant or another that does not"
        )
    return scheduler.lr_lambdas[0]
