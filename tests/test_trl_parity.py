"""The same losses and gradients as TRL's trainers on the same tokens and weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, sharpen
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt.data.tree import PromptTree
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
from prefopt.trainers.base import TreeDataset
from prefopt.trainers.dpo import DPOConfig, DPOTrainer

LOSSES: dict[str, dict[str, float]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.05},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "nca_pair": {},
    "bco_pair": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "discopop": {},
    "sigmoid_norm": {},
}
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    num_labels=1,
)


def pairs() -> list[PromptTree]:
    source = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        length = source.randint(shortest, longest)
        return [source.randrange(3, VOCABULARY) for _ in range(length)]

    return [PromptTree(ids(1, 20), [[*ids(0, 12), 2], [*ids(0, 12), 2]]) for _ in range(6)]


def reference_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return sharpen(AutoModelForCausalLM.from_config(CONFIG), 4.0)


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The policy some steps later: margins of several nats on both sides of zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def settings(folder: Path) -> dict[str, Any]:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    sizes = {"per_device_train_batch_size": 6, "per_device_eval_batch_size": 6}
    return quiet | sizes | {"output_dir": str(folder), "bf16": False}


def loss_and_gradients(model: PreTrainedModel, loss: Tensor) -> tuple[float, Tensor]:
    model.zero_grad()
    loss.backward()
    found = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return loss.item(), torch.cat(found)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    """TRL's trainer with its reference model, and its collator's batch of our pairs."""
    from datasets import Dataset
    from trl import DPOConfig as TheirConfig
    from trl import DPOTrainer as TheirTrainer

    folder = tmp_path_factory.mktemp("trl")
    args = TheirConfig(**settings(folder), max_length=None, gradient_checkpointing=False, beta=0.2)
    text = Dataset.from_list([{"prompt": "w3", "chosen": "w4", "rejected": "w5"}])
    trainer = TheirTrainer(
        model=moved(reference_model()),
        ref_model=reference_model().eval(),
        args=args,
        train_dataset=text,
        processing_class=tokenizer(),
    )
    rows = [
        {"prompt_ids": t.prompt, "chosen_ids": t.completions[0], "rejected_ids": t.completions[1]}
        for t in pairs()
    ]
    trainer.model.train()
    return trainer, trainer.data_collator(rows)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> DPOTrainer:
    """Our trainer after its own reference pass, its policy moved as TRL's."""
    folder = tmp_path_factory.mktemp("ours")
    args = DPOConfig(**settings(folder), beta=0.2)
    trainer = DPOTrainer(reference_model(), args, TreeDataset(pairs()))
    trainer.before_training(resumed=False)
    trainer.model.load_state_dict(moved(reference_model()).state_dict())
    trainer.model.train()
    return trainer


def our_loss(trainer: Any, batches: list[list[int]]) -> Tensor:
    """The loss as training adds it up over micro-batches."""
    data = trainer.train_dataset
    inputs = [trainer.collate([data[i] for i in batch]) for batch in batches]
    count = trainer._get_num_items_in_batch(inputs, torch.device("cpu"))
    return sum(trainer.compute_loss(trainer.model, x, num_items_in_batch=count) for x in inputs)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_dpo_losses_and_gradients(loss_type, ours, theirs) -> None:
    their_trainer, batch = theirs
    their_trainer.loss_types = [loss_type]
    their_trainer.label_smoothing = LOSSES[loss_type].get("label_smoothing", 0.0)
    loss = their_trainer.compute_loss(their_trainer.model, dict(batch))
    expected, expected_gradients = loss_and_gradients(their_trainer.model, loss)

    ours.args.loss_type = loss_type
    ours.args.label_smoothing = their_trainer.label_smoothing
    found, found_gradients = loss_and_gradients(ours.model, our_loss(ours, [[0, 1, 2, 3, 4, 5]]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative(found_gradients, expected_gradients) < 1e-4


def test_the_pairs_above_are_no_easy_case(ours, theirs) -> None:
    """Margins on both sides of zero, far from it, and gradients that differ between losses."""
    data = ours.train_dataset
    ours.args.loss_type, ours.args.label_smoothing = "sigmoid", 0.0
    _, metrics = ours.tree_losses(ours.model, ours.collate([data[i] for i in range(6)]))
    margins = metrics["rewards/margins"]
    assert margins.min() < -0.1
    assert margins.max() > 0.1
    sigmoid = loss_and_gradients(ours.model, our_loss(ours, [[0, 1, 2, 3, 4, 5]]))[1]
    ours.args.loss_type = "apo_zero"
    other = loss_and_gradients(ours.model, our_loss(ours, [[0, 1, 2, 3, 4, 5]]))[1]
    assert relative(sigmoid, other) > 1e-2


def test_metrics_share_names_and_values(ours, theirs) -> None:
    their_trainer, batch = theirs
    their_trainer.loss_types, their_trainer.label_smoothing = ["sigmoid"], 0.0
    their_trainer._metrics["train"].clear()
    their_trainer.compute_loss(their_trainer.model, dict(batch))
    expected = {name: values[-1] for name, values in their_trainer._metrics["train"].items()}
    ours.args.loss_type, ours.args.label_smoothing = "sigmoid", 0.0
    _, found = ours.tree_losses(ours.model, ours.collate([ours.train_dataset[i] for i in range(6)]))
    assert len(found) == 6
    for name, values in found.items():
        assert values.mean().item() == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def reward_model() -> PreTrainedModel:
    torch.manual_seed(2)
    return sharpen(AutoModelForSequenceClassification.from_config(CONFIG), 8.0)


def their_reward_loss(rows: list[dict[str, Any]], centering: float | None, folder: Path) -> Any:
    """TRL's reward model loss on all rows as one batch, and the gradients."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(
        **settings(folder),
        center_rewards_coefficient=centering,
        gradient_checkpointing=False,
        max_length=None,
    )
    data = Dataset.from_list(rows)
    trainer = RewardTrainer(
        model=reward_model(), args=args, train_dataset=data, processing_class=tokenizer()
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    return loss_and_gradients(trainer.model, trainer.compute_loss(trainer.model.train(), batch))


@pytest.mark.parametrize("centering", [None, 0.05])
@pytest.mark.parametrize("margins", [None, [0.5 * i for i in range(6)]], ids=["", "margins"])
def test_reward_model_losses_and_gradients(centering, margins, tmp_path) -> None:
    trees = pairs()
    names = ("chosen_ids", "rejected_ids")
    rows = [
        {name: [*t.prompt, *c] for name, c in zip(names, t.completions, strict=True)}
        | ({"margin": margins[i]} if margins else {})
        for i, t in enumerate(trees)
    ]
    expected, expected_gradients = their_reward_loss(rows, centering, tmp_path / "theirs")
    args = RewardModelConfig(
        **settings(tmp_path / "ours"), center_rewards_coefficient=centering or 0.0
    )
    data = TreeDataset(trees, {"margin": margins} if margins else None)
    trainer = RewardModelTrainer(reward_model(), args, data)
    trainer.model.train()
    for batches in ([[0, 1, 2, 3, 4, 5]], [[5, 1, 2], [0], [4, 3]]):
        found, gradients = loss_and_gradients(trainer.model, our_loss(trainer, batches))
        assert found == pytest.approx(expected, rel=1e-5)
        assert relative(gradients, expected_gradients) < 1e-4
    assert abs(expected - 0.6931) > 0.03, "a model that separates nothing would pass"


def test_micro_batches_of_unequal_size_add_up_to_trls_batch(ours, theirs) -> None:
    their_trainer, batch = theirs
    their_trainer.loss_types, their_trainer.label_smoothing = ["sigmoid"], 0.0
    loss = their_trainer.compute_loss(their_trainer.model, dict(batch))
    expected, expected_gradients = loss_and_gradients(their_trainer.model, loss)
    ours.args.loss_type, ours.args.label_smoothing = "sigmoid", 0.0
    found, gradients = loss_and_gradients(ours.model, our_loss(ours, [[2], [0, 5, 1], [4, 3]]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative(gradients, expected_gradients) < 1e-4
