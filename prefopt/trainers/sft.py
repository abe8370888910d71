"""Supervised fine-tuning through TRL's SFTTrainer, on rows that prefopt tokenised.

This file is the project's only contact with TRL. Ids, masks and EOS come from the same code as in
every other trainer; the loss counts answer tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig as TRLSFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from prefopt.data.tokenize import Ragged
from prefopt.trainers.base import CompleteCheckpoints


@dataclass
class SFTConfig(TRLSFTConfig):
    """TRL's SFTConfig; learning rate 2e-5 is the value of the RLHF Workflow recipe."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Trade time for memory, as in every other trainer."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Never hide a loss that is not finite."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    max_length: int | None = field(
        default=None, metadata={"help": "Rows come tokenised and within data.max_length."}
    )


class SFTTrainer(CompleteCheckpoints, TRLSFTTrainer):
    """TRL's trainer, with checkpoints marked complete and without its telemetry.

    Args:
        model: A loaded causal LM.
        args: An :class:`SFTConfig`.
        train_dataset: Rows with ``prompt_ids`` and ``completion_ids``.
        eval_dataset: Held-out rows, likewise.
        processing_class: The policy's tokenizer.
        **kwargs: What else TRL's SFTTrainer takes (peft_config, callbacks).
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        train_dataset: Iterable[dict[str, Any]],
        eval_dataset: Iterable[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        args.completion_only_loss = True
        super().__init__(
            model=model,
            args=args,
            train_dataset=_with_mask(train_dataset),
            eval_dataset=None if eval_dataset is None else _with_mask(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )

    def _send_telemetry(self) -> None:
        """Training is nobody else's business."""


def _with_mask(rows: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """Joins prompt and completion; the mask is 1 on the tokens that bear loss."""
    ids, mask = Ragged(), Ragged()
    for row in rows:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        ids.append(prompt + completion)
        mask.append([0] * len(prompt) + [1] * len(completion))
    table = pa.table({"input_ids": ids.to_arrow(), "completion_mask": mask.to_arrow()})
    return datasets.Dataset(table)
