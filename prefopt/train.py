"""``prefopt train``: from a recipe to a run folder with a model in ``final/``."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefopt.data.rows import parse_demonstrations, parse_pair, validate
from prefopt.data.sources import Source, read_rows, read_sources
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import Tokenized, tokenize_demonstrations, tokenize_pairs
from prefopt.errors import PrefoptError
from prefopt.eval.reward_model import reward_model_report
from prefopt.models.load import load_policy, load_reward_model, load_tokenizer
from prefopt.recipe import Recipe, load_recipe
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
from prefopt.rounds.storage import atomic_write, sync_tree
from prefopt.run_folder import MetricsFile, ProgressBar, open_run
from prefopt.trainers import TRAINERS
from prefopt.trainers.base import last_complete_checkpoint
from prefopt.trainers.pairs import pair_dataset
from prefopt.trainers.sft import SFTTrainer

logger = logging.getLogger(__name__)

# name in a recipe -> (config, trainer)
ALGORITHMS: dict[str, tuple[type[Any], type[Trainer]]] = {
    **TRAINERS,
    "reward_model": (RewardModelConfig, RewardModelTrainer),
}


@dataclass(frozen=True)
class Rows:
    """The tokenised data of a run.

    Attributes:
        train: Rows to train on.
        evaluation: Held-out rows, or None.
        invalid: Rows left out by ``data.invalid_rows=drop``, by problem.
    """

    train: Tokenized
    evaluation: Tokenized | None
    invalid: dict[str, int]


def known_keys() -> dict[str, set[str]]:
    """The keys that the trainer section may hold, by algorithm."""
    return {
        name: {f.name for f in fields(config) if f.init} for name, (config, _) in ALGORITHMS.items()
    }


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks its trainer section against all algorithms.

    Raises:
        PrefoptError: The file, an override, a key or a value is wrong.
    """
    return load_recipe(path, overrides, known_keys())


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Reads, validates and tokenises the data of a recipe; no model is needed.

    Raises:
        PrefoptError: A source cannot be read, a row is wrong, or no row is short enough.
    """
    data = recipe.data
    sources = [Source(**s.model_dump()) for s in data.sources or ()] or [
        Source(data.path, split=data.split, name=data.name, revision=data.revision)
    ]
    demonstrations = recipe.trainer.algorithm == "sft"
    parse: Callable[..., Any] = parse_demonstrations if demonstrations else parse_pair
    tokenize: Callable[..., Any] = tokenize_demonstrations if demonstrations else tokenize_pairs

    def parsed(located: Any) -> tuple[list[Any], dict[str, int]]:
        items, problems = validate(located, parse, invalid=data.invalid_rows)
        return ([d for row in items for d in row] if demonstrations else items), problems

    items, invalid = parsed(read_sources(sources, seed=recipe.seed))
    held_out: list[Any] = []
    if data.eval_fraction:
        items, held_out = split_by_prompt(items, data.eval_fraction, recipe.seed)
    elif data.eval_path or data.eval_split:
        path, split = data.eval_path or data.path, data.eval_split or "train"
        held_out, more = parsed(read_rows(path, split=split, name=data.name))
        invalid = {k: invalid.get(k, 0) + more.get(k, 0) for k in invalid | more}
    items = items[: data.max_rows]
    conversational = not isinstance(items[0].prompt, str)
    check_tokenizer(tokenizer, conversational=conversational)
    limits = {"max_prompt_length": data.max_prompt_length, "max_length": data.max_length}
    return Rows(
        tokenize(items, tokenizer, **limits),
        tokenize(held_out, tokenizer, **limits) if held_out else None,
        invalid,
    )


def split_by_prompt(items: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Holds out a random share of the prompts with all their rows."""
    keys = [json.dumps(item.prompt, sort_keys=True) for item in items]
    prompts = sorted(set(keys))
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, round(fraction * len(prompts)))])
    train = [item for item, key in zip(items, keys, strict=True) if key not in held_out]
    if not train:
        raise PrefoptError(
            f"data.eval_fraction={fraction} leaves no rows to train on ({len(prompts)} prompts)"
        )
    return train, [item for item, key in zip(items, keys, strict=True) if key in held_out]


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe to its end, from wherever an earlier process left it.

    Returns:
        What the run folder's ``summary.json`` says.

    Raises:
        PrefoptError: Something in the recipe, the data or the model is wrong.
    """
    folder = Path(recipe.run_dir)
    main = PartialState().is_main_process
    if main:
        open_run(recipe)
    PartialState().wait_for_everyone()
    summary = folder / "summary.json"
    if summary.exists():
        logger.info("%s is complete", folder)
        return json.loads(summary.read_text())
    tokenizer = load_tokenizer(
        recipe.model.path,
        revision=recipe.model.revision,
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    rows = load_rows(recipe, tokenizer)
    set_seed(recipe.seed)
    trainer = make_trainer(recipe, tokenizer, rows)
    outcome = trainer.train(
        resume_from_checkpoint=_as_text(last_complete_checkpoint(folder / "checkpoints"))
    )
    result = {
        "algorithm": recipe.trainer.algorithm,
        "rows": len(rows.train),
        "dropped": vars(rows.train.dropped) | rows.invalid,
        "steps": trainer.state.global_step,
        "seconds": outcome.metrics["train_runtime"],
    }
    if isinstance(trainer, RewardModelTrainer) and trainer.eval_dataset is not None:
        result["reward_model"] = reward_model_report(trainer)
    save_final(trainer, folder)
    if main:
        atomic_write(summary, json.dumps(result, indent=2) + "\n")
    return result


def make_trainer(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Trainer:
    """Loads the model and builds the trainer of a recipe."""
    config_class, trainer_class = ALGORITHMS[recipe.trainer.algorithm]
    folder = Path(recipe.run_dir)
    names = known_keys()[recipe.trainer.algorithm]
    options = {k: v for k, v in recipe.trainer.options.items() if k in names}
    for key in sorted(recipe.trainer.options.keys() - names):
        logger.info("trainer.%s is not used by %s", key, recipe.trainer.algorithm)
    if "bf16" not in options and "fp16" not in options:
        options["bf16"] = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "seed": recipe.seed,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if "log_probs_dir" in names:
        defaults["log_probs_dir"] = str(folder / "log_probs")
        limits = {"max_prompt_length", "max_length"}
        defaults |= {name: getattr(recipe.data, name) for name in limits}
    args = config_class(**{**defaults, **options, "disable_tqdm": True})
    datasets: list[Any] = [rows.train, rows.evaluation]
    if trainer_class is not SFTTrainer:
        datasets = [None if part is None else pair_dataset(part) for part in datasets]
    trainer = trainer_class(
        _load_model(recipe, tokenizer),
        args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=tokenizer,
        peft_config=_lora(recipe),
        callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressBar(recipe.name)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def save_final(trainer: Trainer, folder: Path) -> None:
    """Writes ``final/``: a plain Hugging Face model; an adapter is merged, and kept beside it."""
    partial, final = folder / ".final.partial", folder / "final"
    main = trainer.accelerator.is_main_process
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        trainer.save_model(str(folder / "adapter"))
        if main:
            model.merge_and_unload().save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if main:
        (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to readers
        sync_tree(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def _load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = recipe.model
    options = {
        "dtype": model.dtype,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    if recipe.trainer.algorithm == "reward_model":
        return load_reward_model(model.path, tokenizer, **options)
    return load_policy(model.path, **options)


def _lora(recipe: Recipe) -> Any:
    lora = recipe.model.lora
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="SEQ_CLS" if recipe.trainer.algorithm == "reward_model" else "CAUSAL_LM",
    )


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)
