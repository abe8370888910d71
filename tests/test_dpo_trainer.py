"""DPO training end to end on a tiny model: what must not change a run, and what it reports."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from prefopt.data.tree import PromptTree, collate_trees
from prefopt.errors import PrefoptError
from prefopt.models.logprobs import sequence_log_probs
from prefopt.trainers.base import TreeDataset, disable_dropout
from prefopt.trainers.checkpoints import last_complete_checkpoint
from prefopt.trainers.dpo import DPOConfig, DPOTrainer
from prefopt.trainers.reference import report_initial_margins

REFERENCE_LOG = "prefopt.trainers.reference"


@pytest.fixture
def make_trainer(tiny_llama, random_trees, tmp_path):
    """Makes trainers on the same 29 pairs and the same initial weights, each in a run folder."""

    def make(run: str = "run", trees: Any = None, **options: Any) -> DPOTrainer:
        extra = {
            name: options.pop(name)
            for name in ("peft_config", "eval_dataset", "callbacks")
            if name in options
        }
        columns = options.pop("columns", None)
        model = options.pop("model", None)
        config: dict[str, Any] = {
            "output_dir": str(tmp_path / run),
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
        }
        dataset = TreeDataset(trees or random_trees([2] * 29), columns)
        model = model or tiny_llama(sharpness=3.0)
        return DPOTrainer(model, DPOConfig(**config | options), dataset, **extra)

    return make


def trained(trainer: DPOTrainer, **kwargs: Any) -> dict[str, Tensor]:
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train(**kwargs)
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in after), "nothing was trained"
    return after


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def test_micro_batches_do_not_change_a_run(make_trainer) -> None:
    """29 pairs: an epoch ends with a step of 5 pairs, which 3-pair micro-batches split 3 + 2."""
    options = {"max_steps": 6, "optim": "sgd", "learning_rate": 0.1}
    runs = []
    for size, steps in ((8, 1), (1, 8), (4, 2)):
        trainer = make_trainer(
            f"{size}x{steps}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            **options,
        )
        runs.append((trained(trainer), losses(trainer)))
    (weights, history), *others = runs
    assert len(history) == 6
    assert max(history) - min(history) > 1e-2, "the loss must move for this to mean anything"
    for other_weights, other_history in others:
        assert difference(weights, other_weights) < 2e-5
        assert other_history == pytest.approx(history, abs=2e-5)


def test_separate_rows_train_to_the_same_weights(make_trainer) -> None:
    options = {"optim": "sgd", "learning_rate": 0.1}
    weights = trained(make_trainer("tree", layout="tree", **options))
    trainer = make_trainer("separate", layout="separate", **options)
    assert difference(trained(trainer), weights) < 2e-5
    assert trainer.layout == "separate"
    assert {p.name for p in Path(trainer.args.output_dir, "log_probs").iterdir()} != {
        p.name
        for p in Path(trainer.args.output_dir).with_name("tree").joinpath("log_probs").iterdir()
    }


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_margins_are_zero_before_the_first_step(peft_config, make_trainer, caplog) -> None:
    trainer = make_trainer(peft_config=peft_config)
    with caplog.at_level(logging.INFO, REFERENCE_LOG):
        trainer.train()
    stated = [r for r in caplog.records if "step 0" in r.getMessage()]
    assert [r.levelname for r in stated] == ["INFO"]
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(trainer.state.log_history[3]["rewards/margins"]) > 1e-2
    assert report_initial_margins(trainer, trainer.train_dataset, beta=1.0) > 0.05, (
        "the weights have moved since"
    )
    assert caplog.records[-1].levelname == "WARNING"


def test_the_reference_of_an_adapter_is_the_model_below_it(make_trainer, tiny_llama) -> None:
    full = make_trainer("full")
    full.before_training(resumed=False)
    lora = make_trainer("lora", peft_config=LORA)
    with torch.no_grad():
        for name, parameter in lora.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora.before_training(resumed=False)
    for a, b in zip(*(t.train_dataset.columns["reference"] for t in (full, lora)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    folders = [sorted(Path(t.args.output_dir, "log_probs").iterdir()) for t in (full, lora)]
    assert folders[0][0].name == folders[1][0].name, "one store serves both"


def test_the_reference_is_taken_without_dropout(make_trainer, tiny_llama, random_trees) -> None:
    model = tiny_llama(sharpness=3.0, attention_dropout=0.3)
    trainer = make_trainer(model=model, disable_dropout=False, layout="tree")
    chosen, rejected = pair_log_probs(model, random_trees([2] * 29))
    model.train()
    trainer.before_training(resumed=False)
    found = torch.stack(list(trainer.train_dataset.columns["reference"]))
    assert torch.allclose(found, torch.stack([chosen, rejected], 1), rtol=0, atol=1e-4)


class Interrupt(TrainerCallback):
    """Ends the process, as it were, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    peft_config, make_trainer, tiny_llama
) -> None:
    """Killed in the first epoch and again in the third, with dropout so that every RNG counts."""
    options = {
        "max_steps": 9,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "disable_dropout": False,
        "peft_config": peft_config,
    }

    def model() -> nn.Module:
        return tiny_llama(sharpness=3.0, attention_dropout=0.2)

    whole = make_trainer("whole", model=model(), **options)
    expected = trained(whole)
    folder = Path(whole.args.output_dir).with_name("killed")
    for kill_at, resume_from in ((3, None), (9, "checkpoint-2")):
        newest = last_complete_checkpoint(folder)
        assert (newest and newest.name) == resume_from
        trainer = make_trainer("killed", model=model(), callbacks=[Interrupt(kill_at)], **options)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=newest and str(newest))
    newest = last_complete_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-8"
    resumed = make_trainer("killed", model=model(), **options)
    found = trained(resumed, resume_from_checkpoint=str(newest))
    assert difference(found, expected) == 0.0
    assert losses(resumed) == losses(whole)


def test_dropout_matters_in_the_test_above(make_trainer, tiny_llama) -> None:
    runs = []
    for rate in (0.0, 0.2):
        model = tiny_llama(sharpness=3.0, attention_dropout=rate)
        runs.append(trained(make_trainer(f"{rate}", model=model, disable_dropout=False)))
    assert difference(*runs) > 1e-3


def test_a_checkpoint_cut_short_is_passed_over(make_trainer, monkeypatch) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = make_trainer(**options)
    save = trainer._save_rng_state

    def cut(folder: str) -> None:
        if folder.endswith("-3"):
            raise KeyboardInterrupt
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", cut)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    folder = Path(trainer.args.output_dir)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-1", "checkpoint-2", "log_probs"}
    newest = last_complete_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-2"
    expected = trained(make_trainer("whole", **options))
    found = trained(make_trainer(**options), resume_from_checkpoint=str(newest))
    assert difference(found, expected) == 0.0
    assert last_complete_checkpoint(folder) == folder / "checkpoint-3"
    assert last_complete_checkpoint(folder / "nothing-here") is None


def test_the_newest_checkpoint_is_so_by_number(tmp_path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_a_resumed_run_whose_reference_is_gone(peft_config, make_trainer) -> None:
    """The weights have moved: only a model under an adapter can still be asked."""
    options = {"save_strategy": "steps", "save_steps": 2, "peft_config": peft_config}
    trainer = make_trainer(**options)
    trainer.train()
    folder = Path(trainer.args.output_dir)
    expected = [t.clone() for t in trainer.train_dataset.columns["reference"]]
    shutil.rmtree(folder / "log_probs")
    resumed = make_trainer(**options, run="run")
    checkpoint = str(folder / "checkpoint-2")
    if peft_config is None:
        with pytest.raises(PrefoptError, match="log-probs of this run are gone"):
            resumed.train(resume_from_checkpoint=checkpoint)
        return
    resumed.train(resume_from_checkpoint=checkpoint)
    for a, b in zip(resumed.train_dataset.columns["reference"], expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_the_reference_is_computed_once(make_trainer, tmp_path, monkeypatch) -> None:
    first = make_trainer("first", log_probs_dir=str(tmp_path / "shared"))
    weights = trained(first)
    from prefopt.trainers import reference

    monkeypatch.delattr(reference, "fill_shards")
    again = make_trainer("again", log_probs_dir=str(tmp_path / "shared"))
    assert difference(trained(again), weights) == 0.0


@pytest.mark.parametrize(
    "change",
    [{"max_length": 1000}, {"layout": "separate"}, {"bf16": True}, {"model": 1}, {"rows": 1}],
)
def test_another_setting_has_a_reference_of_its_own(
    change, make_trainer, tiny_llama, random_trees, tmp_path
) -> None:
    make_trainer("first", log_probs_dir=str(tmp_path / "shared")).before_training(resumed=False)
    if "model" in change:
        change = {"model": tiny_llama(seed=1)}
    if "rows" in change:
        change = {"trees": random_trees([2] * 29, seed=1)}
    other = make_trainer("other", log_probs_dir=str(tmp_path / "shared"), **change)
    other.before_training(resumed=False)
    assert len(list((tmp_path / "shared").iterdir())) == 2


def pair_log_probs(model: nn.Module, trees: list[PromptTree]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        values = sequence_log_probs(model.eval(), collate_trees(trees))
    return values[0::2], values[1::2]


def test_what_training_reports(make_trainer, random_trees) -> None:
    """One step holds all seven pairs in micro-batches of 2, 2, 2 and 1."""
    trees = random_trees([2] * 7)
    trainer = make_trainer(
        trees=trees,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=2,
        beta=0.3,
        optim="sgd",
        learning_rate=0.05,
    )
    chosen, rejected = pair_log_probs(trainer.model, trees)
    states: list[tuple[Tensor, Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            states.append(pair_log_probs(trainer.model, trees))

    trainer.add_callback(Watch())
    trainer.train()
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    lengths = torch.tensor([[len(c) for c in t.completions] for t in trees]).float()
    for entry in (first, second):
        assert entry["length/mean"] == pytest.approx(lengths.mean().item(), rel=1e-5)
        assert entry["length/chosen"] == pytest.approx(lengths[:, 0].mean().item(), rel=1e-5)
        assert entry["length/rejected"] == pytest.approx(lengths[:, 1].mean().item(), rel=1e-5)
        assert entry["tokens_per_second"] > 0
        assert entry["grad_norm"] > 0
    assert first["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert first["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    rewards = [0.3 * (now - then) for now, then in zip(states[0], (chosen, rejected), strict=True)]
    margins = rewards[0] - rewards[1]
    expected = {
        "loss": -nn.functional.logsigmoid(margins).mean(),
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).float().mean(),
        "logps/chosen": states[0][0].mean(),
        "logps/rejected": states[0][1].mean(),
    }
    for name, value in expected.items():
        assert second[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert margins.abs().min() > 1e-3


def test_what_evaluation_reports(make_trainer, random_trees) -> None:
    held_out = random_trees([2] * 5, seed=9)
    trainer = make_trainer(
        eval_dataset=TreeDataset(held_out),
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
    )
    before = pair_log_probs(trainer.model, held_out)
    trainer.train()
    after = pair_log_probs(trainer.model, held_out)
    rewards = [0.1 * (now - then) for now, then in zip(after, before, strict=True)]
    margins = rewards[0] - rewards[1]
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    expected = {
        "eval_loss": -nn.functional.logsigmoid(margins).mean(),
        "eval_rewards/chosen": rewards[0].mean(),
        "eval_rewards/rejected": rewards[1].mean(),
        "eval_rewards/margins": margins.mean(),
        "eval_rewards/accuracies": (margins > 0).float().mean(),
        "eval_logps/chosen": after[0].mean(),
        "eval_length/mean": torch.tensor([len(c) for t in held_out for c in t.completions])
        .float()
        .mean(),
    }
    for name, value in expected.items():
        assert entries[-1][name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert not any(name.startswith("rewards") for name in entries[-1])
    assert "eval_tokens_per_second" not in entries[-1]
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert not any(name.startswith("eval_") for entry in steps for name in entry)


def test_soft_labels_are_used(make_trainer, random_trees) -> None:
    """A chosen completion that is never the better one is a rejected one."""
    trees = random_trees([2] * 8)
    swapped = [PromptTree(t.prompt, t.completions[::-1]) for t in trees]
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "label_smoothing": 0.0}

    def run(name: str, rows: list[PromptTree], p: float | None) -> dict[str, Tensor]:
        columns = None if p is None else {"p_chosen": [p] * 8}
        return trained(make_trainer(name, rows, columns=columns, **options))

    hard = run("hard", trees, None)
    assert difference(run("one", trees, 1.0), hard) < 1e-6
    flipped = run("zero", swapped, 0.0)
    assert difference(flipped, hard) < 1e-5
    assert difference(run("ninety", trees, 0.9), hard) > 1e-3


def test_even_labels_say_nothing_at_the_start(make_trainer, random_trees) -> None:
    trainer = make_trainer(
        trees=random_trees([2] * 8), columns={"p_chosen": [0.5] * 8}, max_steps=1
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_a_loss_without_reference_runs_no_reference_pass(make_trainer) -> None:
    trainer = make_trainer(loss_type="simpo", beta=2.0)
    trained(trainer)
    assert not Path(trainer.args.output_dir, "log_probs").exists()


DROPOUT = {
    "LlamaConfig": {"attention_dropout": 0.2},
    "GPT2Config": {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "GPTNeoXConfig": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
    "Starcoder2Config": {"residual_dropout": 0.2, "embedding_dropout": 0.2},
    "OPTConfig": {"dropout": 0.2, "layerdrop": 0.5, "word_embed_proj_dim": 32, "ffn_dim": 64},
}


@pytest.mark.parametrize("family", DROPOUT)
def test_no_dropout_is_left(family) -> None:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, family)(**shape | DROPOUT[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        model.train()
        assert not torch.allclose(model(ids).logits, expected, atol=1e-5)
        disable_dropout(model)
        for _ in range(5):
            assert torch.allclose(model(ids).logits, expected, atol=1e-6)


def test_an_adapter_keeps_its_dropout(make_trainer) -> None:
    config = LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=config)
    rates = {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}


def test_a_layout_that_does_not_exist_is_refused(make_trainer) -> None:
    with pytest.raises(PrefoptError, match="'forest', expected auto, tree or separate"):
        make_trainer(layout="forest")


def test_gradient_checkpointing_does_not_change_a_run(make_trainer) -> None:
    options = {"optim": "sgd", "learning_rate": 0.1}
    plain = trained(make_trainer("plain", **options))
    checked = trained(make_trainer("checked", gradient_checkpointing=True, **options))
    assert difference(plain, checked) < 1e-6
