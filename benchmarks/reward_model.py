"""A whole reward-model training step: prefopt's RewardModelTrainer against TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from measure import DEVICE, Contestant, Settings, compare_training
from torch import Tensor
from transformers import LlamaForSequenceClassification


def classifier(settings: Settings) -> LlamaForSequenceClassification:
    torch.manual_seed(settings.seed)
    return LlamaForSequenceClassification(settings.config).to(DEVICE)


def prefopt(settings: Settings, mode: str) -> Contestant:
    from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
    from prefopt.trainers.base import TreeDataset

    model = classifier(settings)
    args = RewardModelConfig(**settings.training_arguments(max_prompt_length=None))
    trainer = RewardModelTrainer(model, args, TreeDataset(settings.rows()))
    trainer.before_training(resumed=False)

    def loss(indices: Sequence[int]) -> Tensor:
        rows = [trainer.train_dataset[i] for i in indices]
        batch = trainer._prepare_inputs(trainer.collate(rows))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, batch)

    return Contestant(model, loss)


def trl(settings: Settings, mode: str) -> Contestant:
    import datasets
    from dpo import tokenizer
    from trl import RewardConfig, RewardTrainer

    model = classifier(settings)
    names = ("chosen_ids", "rejected_ids")
    rows = [
        {name: [*row.prompt, *ids] for name, ids in zip(names, row.completions, strict=True)}
        for row in settings.rows()
    ]
    trainer = RewardTrainer(
        model,
        RewardConfig(**settings.training_arguments()),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(settings),
    )

    def loss(indices: Sequence[int]) -> Tensor:
        batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in indices]))
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, batch)

    return Contestant(model, loss)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare_training("reward_model", {"prefopt": prefopt, "trl": trl}, ("step",), argv)


if __name__ == "__main__":
    main()
