"""A whole DPO training step: prefopt's DPOTrainer against TRL's.

All get the same model, rows, reference log-probs and optimiser. TRL runs as it is (on a CPU its
head scores every position) and with the head it uses on CUDA (completion tokens only).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from measure import DEVICE, EOS, PAD, Contestant, Settings, compare_training, perturb
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STORED, IN_STEP = "stored", "in-step"  # where the reference log-probs come from


def policy(settings: Settings) -> LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(settings.config).to(DEVICE)


def prefopt(settings: Settings, mode: str) -> Contestant:
    from prefopt.models.logprobs import sequence_log_probs
    from prefopt.trainers.base import TreeDataset
    from prefopt.trainers.dpo import DPOConfig, DPOTrainer

    model = policy(settings)
    args = DPOConfig(**settings.training_arguments(max_prompt_length=None))
    trainer = DPOTrainer(model, args, TreeDataset(settings.rows()))
    trainer.before_training(resumed=False)
    reference = copy.deepcopy(model).requires_grad_(False) if mode == IN_STEP else None
    perturb(model, settings.seed)

    def loss(indices: Sequence[int]) -> Tensor:
        rows = [trainer.train_dataset[i] for i in indices]
        batch = trainer._prepare_inputs(trainer.collate(rows))
        with trainer.compute_loss_context_manager():
            if reference is not None:
                with torch.no_grad():
                    batch["reference"] = sequence_log_probs(reference, batch["trees"])
            return trainer.compute_loss(model, batch)

    return Contestant(model, loss)


def trl(settings: Settings, mode: str) -> Contestant:
    import datasets
    from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    model = policy(settings)
    args = settings.training_arguments(precompute_ref_log_probs=mode == STORED)
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model) if mode == IN_STEP else None,
        DPOConfig(**args),
        train_dataset=datasets.Dataset.from_list(texts(settings)),
        processing_class=tokenizer(settings),
    )
    perturb(model, settings.seed)
    rows = trainer.train_dataset.remove_columns(["prompt", "chosen", "rejected"]).to_list()

    def loss(indices: Sequence[int]) -> Tensor:
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in indices]))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, batch)

    return Contestant(model, loss)


def trl_compact_head(settings: Settings, mode: str) -> Contestant:
    stock = trl(settings, mode)

    def loss(indices: Sequence[int]) -> Tensor:
        # asked by the head whether to leave out prompt and padding; the kernels ask elsewhere
        with patch("trl.trainer.utils._use_triton", return_value=True):
            return stock.loss(indices)

    return Contestant(stock.model, loss)


def words(settings: Settings) -> list[str]:
    """One word a token id."""
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
