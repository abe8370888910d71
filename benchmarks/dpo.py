"""A whole DPO training step: prefopt's DPOTrainer against TRL's.

All get the same model, rows and optimiser. TRL runs as it is (on a CPU its head scores every
position) and with the head it uses on CUDA, which scores completion tokens only.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from measure import DEVICE, EOS, PAD, Settings
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from training import Contestant, compare_training, perturb, training_arguments
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

STORED, IN_STEP = "stored reference", "reference in step"


def policy(settings: Settings) -> PreTrainedModel:
    torch.manual_seed(settings.seed)
    with torch.device(DEVICE):  # where a billion random numbers are made in no time
        return AutoModelForCausalLM.from_config(settings.config)


def prefopt(settings: Settings, mode: str) -> Contestant:
    from prefopt.models.logprobs import sequence_log_probs
    from prefopt.trainers.base import TreeDataset
    from prefopt.trainers.dpo import DPOConfig, DPOTrainer

    model = policy(settings)
    args = DPOConfig(**training_arguments(settings, max_prompt_length=None))
    trainer = DPOTrainer(model, args, TreeDataset(settings.rows()))
    trainer.before_training(resumed=False)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    reference = copy.deepcopy(model).requires_grad_(False) if mode == IN_STEP else None
    perturb(model, settings.seed)

    def reference_in_step(batch: dict[str, Any]) -> None:
        if reference is not None:
            with torch.no_grad():
                batch["reference"] = sequence_log_probs(reference, batch["trees"])

    return Contestant(trainer, rows, reference_in_step)


def trl(settings: Settings, mode: str, contestant: type[Contestant] = Contestant) -> Contestant:
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    model = policy(settings)
    arguments = training_arguments(settings, precompute_ref_log_probs=mode == STORED)
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model) if mode == IN_STEP else None,
        DPOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(texts(settings)),
        processing_class=tokenizer(settings),
    )
    perturb(model, settings.seed)
    rows = trainer.train_dataset.remove_columns(["prompt", "chosen", "rejected"]).to_list()
    return contestant(trainer, rows)


class WithCompactHead(Contestant):
    """Tells TRL's head to leave out prompt and padding; its kernels decide for themselves."""

    def loss(self, indices: Sequence[int]) -> Tensor:
        """The same loss."""
        with patch("trl.trainer.utils._use_triton", return_value=True):
            return super().loss(indices)


def trl_compact_head(settings: Settings, mode: str) -> Contestant:
    return trl(settings, mode, WithCompactHead)


def words(settings: Settings) -> list[str]:
    """A word for every token id."""
    return ["<pad>", "</s>", *(f"t{i}" for i in range(2, settings.config.vocab_size))]


def texts(settings: Settings) -> list[dict[str, str]]:
    """The rows as text, because TRL's trainer tokenises its data set itself."""
    vocabulary = words(settings)

    def text(ids: Sequence[int]) -> str:
        return "".join(f" {vocabulary[i]}" for i in ids)

    return [
        {"prompt": text(row.prompt), "chosen": text(chosen), "rejected": text(rejected)}
        for row in settings.rows()
        for chosen, rejected in [row.completions]
    ]


def tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    vocabulary = words(settings)
    ids = {word: i for i, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[PAD]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=vocabulary[PAD], eos_token=vocabulary[EOS]
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    builders = {"prefopt": prefopt, "trl": trl, "trl_compact_head": trl_compact_head}
    return compare_training("dpo", builders, (STORED, IN_STEP), argv)


if __name__ == "__main__":
    main()
