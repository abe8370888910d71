"""What a run in rounds is told: its keys, its prompts, its schedule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from prefopt.data.rows import parse_prompt, validate
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import TokenizedPrompts, tokenize_prompts
from prefopt.errors import PrefoptError
from prefopt.rollout.engine import SamplingSettings
from prefopt.rounds.pairing import PairingSettings, check_samples
from prefopt.trainers.base import TreeTrainerConfig

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
        if self.redraws < 0:
            raise PrefoptError(f"redraws: found {self.redraws}, expected 0 or more")
        if self.num_train_epochs <= 0:
            raise PrefoptError(f"num_train_epochs: found {self.num_train_epochs}, expected above 0")
        if self.save_strategy == "best":
            raise PrefoptError(
                "save_strategy: found best, of which rounds know nothing; expected epoch (after "
                "every round), steps or no"
            )
        self.pairing_settings()
        self.ignore_data_skip = True  # where a run stands follows from its step and its rounds
        super().__post_init__()

    def pairing_settings(self) -> PairingSettings:
        """The keys on pairing, together."""
        return PairingSettings(self.pairing, self.length_penalty, self.ties, self.soft_labels)


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


def check_sampling(pairing: PairingSettings, sampling: Sequence[SamplingSettings]) -> None:
    """Checks that samples drawn like this can be paired.

    Raises:
        PrefoptError: There are too few, or all of a part would be the same.
    """
    check_samples(pairing, sum(part.samples_per_prompt for part in sampling))
    for part in sampling:
        if part.temperature == 0 and part.samples_per_prompt > 1:
            raise PrefoptError(
                f"rollout.temperature: found 0 (greedy) for {part.samples_per_prompt} samples of a "
                "prompt, which would all be the same and make no pair; set it above 0"
            )


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
    """The longest prompt, in tokens, that leaves room for a completion; None is no limit.

    Raises:
        PrefoptError: There is no room for any.
    """
    room = None if max_length is None else max_length - max_new_tokens
    if room is not None and room < 1:
        raise PrefoptError(
            f"data.max_length: found {max_length}, which leaves no room for a prompt beside "
            f"rollout.max_new_tokens={max_new_tokens}; raise the one or lower the other"
        )
    return min((n for n in (max_prompt_length, room) if n is not None), default=None)


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
