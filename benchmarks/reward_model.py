"""A whole reward-model training step: prefopt's RewardModelTrainer against TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dpo import tokenizer
from measure import DEVICE, Settings
from training import Contestant, compare_training, training_arguments
from transformers import LlamaForSequenceClassification


def classifier(settings: Settings) -> LlamaForSequenceClassification:
    torch.manual_seed(settings.seed)
    return LlamaForSequenceClassification(settings.config).to(DEVICE)


def prefopt(settings: Settings, mode: str) -> Contestant:
    from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
    from prefopt.trainers.base import TreeDataset

    dataset = TreeDataset(settings.rows())
    args = RewardModelConfig(**training_arguments(settings, max_prompt_length=None))
    trainer = RewardModelTrainer(classifier(settings), args, dataset)
    trainer.before_training(resumed=False)
    return Contestant(trainer, [dataset[i] for i in range(len(dataset))])


def trl(settings: Settings, mode: str) -> Contestant:
    import datasets
    from trl import RewardConfig, RewardTrainer

    datasets.disable_progress_bars()
    rows = [
        {"chosen_ids": [*row.prompt, *chosen], "rejected_ids": [*row.prompt, *rejected]}
        for row in settings.rows()
        for chosen, rejected in [row.completions]
    ]
    trainer = RewardTrainer(
        classifier(settings),
        RewardConfig(**training_arguments(settings)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(settings),
    )
    return Contestant(trainer, rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare_training("reward_model", {"prefopt": prefopt, "trl": trl}, ("step",), argv)


if __name__ == "__main__":
    main()
