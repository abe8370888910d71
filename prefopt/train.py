"""``prefopt train``: from a recipe to a run folder with a model in ``final/``."""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from prefopt.data.rows import parse_demonstrations, parse_pair, validate
from prefopt.data.sources import LocatedRow, Row, Source, read_rows, read_sources
from prefopt.data.template import check_tokenizer, stop_token_ids
from prefopt.data.tokenize import (
    Tokenized,
    tokenize_demonstrations,
    tokenize_pairs,
)
from prefopt.disk import check_space, writing
from prefopt.engines import make_engine
from prefopt.errors import PrefoptError
from prefopt.eval.preference_model import preference_model_report
from prefopt.eval.reward_model import reward_model_report
from prefopt.evaluation import Evaluation, EvaluationTask, prompt_ids_of
from prefopt.evaluation_recipe import asks_in_training, evaluation_task, read_evaluation
from prefopt.models.load import (
    check_quantization,
    load_policy,
    load_reward_model,
    load_tokenizer,
    loaded_whole,
)
from prefopt.preemption import wait_for_safe_points
from prefopt.recipe import Recipe, SamplingPart, load_recipe
from prefopt.reward_models import JUDGES, load_judge
from prefopt.reward_models.preference_trainer import (
    PreferenceModelConfig,
    PreferenceModelTrainer,
    comparison_dataset,
    tokenize_comparisons,
)
from prefopt.reward_models.trainer import RewardModelConfig, RewardModelTrainer
from prefopt.rollout.engine import SamplingSettings
from prefopt.rollout.vllm_process import check_installed
from prefopt.rounds.processes import from_main
from prefopt.rounds.storage import atomic_write, put_in_place
from prefopt.run_folder import MetricsFile, ProgressBar, check_run, open_run
from prefopt.run_lock import run_lock
from prefopt.trainers import TRAINERS
from prefopt.trainers.base import CompleteCheckpoints, TreeTrainer, TreeTrainerConfig
from prefopt.trainers.bounds import Bounds, BoundsGuard
from prefopt.trainers.checkpoints import (
    last_complete_checkpoint,
    remove_leftovers,
    seconds_until,
    weights_size,
)
from prefopt.trainers.pair_rounds import PairRoundTrainer
from prefopt.trainers.pairs import pair_dataset
from prefopt.trainers.reference import shared_fingerprint
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.round_rows import parser_of, tokenize_rows

logger = logging.getLogger(__name__)

# name in a recipe -> (config, trainer)
ALGORITHMS: dict[str, tuple[type[Any], type[Trainer]]] = {
    **TRAINERS,
    "reward_model": (RewardModelConfig, RewardModelTrainer),
    "preference_model": (PreferenceModelConfig, PreferenceModelTrainer),
}

# what a judge is worth on held-out rows
JUDGE_REPORTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "reward_model": reward_model_report,
    "preference_model": preference_model_report,
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


# Keys on evaluation in training, of which algorithms that sample have none.
NEEDS_HELD_OUT_ROWS = {
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "greater_is_better",
    "load_best_model_at_end",
    "metric_for_best_model",
}

# Keys of the configs that a recipe says elsewhere (run_dir, seed, data.max_length, ...), or the
# environment: a token would stand in recipe.yaml.
SAID_ELSEWHERE = {
    "hub_token",
    "output_dir",
    "log_probs_dir",
    "seed",
    "max_length",
    "max_prompt_length",
    "remove_unused_columns",
    "disable_tqdm",
    "rounds_dir",
    "generation_batch_size",
}


def known_keys() -> dict[str, set[str]]:
    """The keys that the trainer section may hold, by algorithm."""
    return {
        name: {f.name for f in fields(config) if f.init} - SAID_ELSEWHERE
        for name, (config, _) in ALGORITHMS.items()
    }


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and checks its trainer section against all algorithms.

    Raises:
        PrefoptError: The file, an override, a key or a value is wrong.
    """
    recipe = load_recipe(path, overrides, known_keys())
    trainer_options(recipe)
    return recipe


def trainer_options(recipe: Recipe) -> dict[str, Any]:
    """The options of the chosen algorithm, as values of the types its config declares.

    Raises:
        PrefoptError: A value has another type.
    """
    algorithm = recipe.trainer.algorithm
    hints = get_type_hints(ALGORITHMS[algorithm][0])
    used = known_keys()[algorithm] & recipe.trainer.options.keys()
    options = {}
    for key in sorted(used):
        value = recipe.trainer.options[key]
        try:
            options[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise PrefoptError(f"trainer.{key}: found {value!r}: {problem}") from error
    return options


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The policy's tokenizer with the recipe's chat template."""
    return load_tokenizer(
        recipe.model.path,
        revision=recipe.model.revision,
        chat_template=recipe.model.chat_template,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def load_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, args: Any) -> Rows:
    """Reads, validates and tokenises the data of a recipe; no model is needed.

    Args:
        recipe: The recipe.
        tokenizer: The policy's.
        args: The trainer's arguments, from :func:`make_config`.

    Raises:
        PrefoptError: A source cannot be read, a row is wrong, or no row is short enough.
    """
    data, parse = recipe.data, row_parser(recipe, args)
    rows, invalid = validate(training_rows(recipe), parse, invalid=data.invalid_rows)
    items = [item for row in rows for item in row]
    held_out: list[Any] = []
    if data.eval_fraction:
        items, held_out = split_by_prompt(items, data.eval_fraction, recipe.seed)
    elif (located := held_out_rows(recipe)) is not None:
        rows, more = validate(located, parse, invalid=data.invalid_rows)
        held_out = [item for row in rows for item in row]
        invalid = {k: invalid.get(k, 0) + more.get(k, 0) for k in invalid | more}
    items = items[: data.max_rows]
    check_tokenizer(tokenizer, conversational=not isinstance(items[0].prompt, str))
    tokenize = tokenizer_of_rows(recipe, tokenizer, args)
    train_rows = tokenize(items)
    for reason, count in {**invalid, **vars(train_rows.dropped)}.items():
        if count:
            logger.warning("rows left out: %d (%s)", count, reason.replace("_", " "))
    if in_rounds(recipe.trainer.algorithm) and held_out:
        distinct = {json.dumps(item.prompt, sort_keys=True) for item in held_out}
        logger.info("held out of training: %d prompts", len(distinct))
        held_out = []
    return Rows(train_rows, tokenize(held_out) if held_out else None, invalid)


def training_rows(recipe: Recipe) -> Iterator[LocatedRow]:
    """The rows that a recipe names to train on, with their places, as they stand in the files.

    Raises:
        PrefoptError: A source cannot be read.
    """
    data = recipe.data
    sources = [Source(**s.model_dump()) for s in data.sources or ()] or [
        Source(str(data.path), split=data.split, name=data.name, revision=data.revision)
    ]
    return read_sources(sources, seed=recipe.seed)


def held_out_rows(recipe: Recipe) -> Iterator[LocatedRow] | None:
    """The rows of ``data.eval_path`` or ``data.eval_split``; None where a recipe names neither.

    Raises:
        PrefoptError: They cannot be read.
    """
    data = recipe.data
    split = data.eval_split or "train"
    if data.eval_path:
        return read_rows(data.eval_path, split=split)
    if data.eval_split:
        return read_rows(str(data.path), split=split, name=data.name, revision=data.revision)
    return None


def row_parser(recipe: Recipe, args: Any) -> Callable[[Row, str], list[Any]]:
    """What reads a row for an algorithm: into one item, or one for each answer to imitate."""
    if recipe.trainer.algorithm == "sft":
        return parse_demonstrations
    parse = parser_of(args) if isinstance(args, RoundConfig) else parse_pair
    return lambda row, where: [parse(row, where)]


def check_judge(recipe: Recipe) -> None:
    """Finds out whether the judge of an algorithm that samples is there, by its tokenizer.

    Raises:
        PrefoptError: It is not, or what runs it is not installed.
    """
    if recipe.judge is not None and asks_in_training(recipe):
        if recipe.judge.engine == "vllm":
            check_installed("judge.engine")
        try:
            load_tokenizer(recipe.judge.path)
        except PrefoptError as error:
            raise PrefoptError(f"judge.path: {error}") from error


def prompts_of_rounds(args: Any, rows: Rows) -> list[int]:
    """How many prompts each round of a run will take; empty for an algorithm without rounds.

    Raises:
        PrefoptError: The prompts cannot be dealt to rounds as the config asks.
    """
    if not isinstance(args, RoundConfig):
        return []
    return [len(planned.prompts) for planned in args.plan(len(rows.train))]


def tokenizer_of_rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, args: Any
) -> Callable[[list[Any]], Any]:
    """What makes token ids of the parsed rows of a recipe, within its limits on lengths."""
    data, algorithm = recipe.data, recipe.trainer.algorithm
    limits = {"max_prompt_length": data.max_prompt_length, "max_length": data.max_length}
    if isinstance(args, RoundConfig):
        longest = recipe.rollout.max_new_tokens
        return partial(tokenize_rows, args=args, tokenizer=tokenizer, max_new_tokens=longest)
    by_algorithm: dict[str, Callable[..., Any]] = {
        "sft": tokenize_demonstrations,
        "preference_model": tokenize_comparisons,
    }
    tokenize = by_algorithm.get(algorithm, tokenize_pairs)
    return partial(tokenize, tokenizer=tokenizer, **limits)


def in_rounds(algorithm: str) -> bool:
    """Whether an algorithm samples, as the rollout section says."""
    return issubclass(ALGORITHMS[algorithm][0], RoundConfig)


def sampling_of(recipe: Recipe) -> list[SamplingSettings]:
    """The rollout section as the settings of each part of a prompt's samples."""
    rollout = recipe.rollout
    parts = rollout.mix or [SamplingPart()]
    common = {name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k")}
    return [
        SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            samples_per_prompt=rollout.samples_per_prompt // len(parts),
            **common | part.model_dump(exclude_none=True),
        )
        for part in parts
    ]


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
        PrefoptError: Something in the recipe, the data or the model is wrong, another process works
            in the run folder, or a guard has ended training.
        Preempted: SIGTERM came, and `prefopt.preemption.watch_sigterm` waits for it.
    """
    args = make_config(recipe)
    main = args.process_index == 0
    with run_lock(Path(recipe.run_dir)) if main else nullcontext():
        return _train(recipe, args)


def _train(recipe: Recipe, args: Any) -> dict[str, Any]:
    folder = Path(recipe.run_dir)
    check_run(recipe)
    main = args.process_index == 0
    summary = folder / "summary.json"
    if summary.exists():
        logger.info("%s is complete", folder)
        return _read_summary(summary)
    if in_rounds(recipe.trainer.algorithm) and recipe.rollout.engine == "vllm":
        check_installed("rollout.engine")
    check_judge(recipe)  # before data are read and models are loaded
    check_quantization(recipe.model.quantization)
    tokenizer = recipe_tokenizer(recipe)
    texts = read_evaluation(recipe)
    rows = load_rows(recipe, tokenizer, args)
    rounds = prompts_of_rounds(args, rows)
    task = None if texts is None else evaluation_task(recipe, texts, args, rounds)
    if main:
        open_run(recipe, {"rows": rows.train.fingerprint, "processes": args.world_size})
    set_seed(recipe.seed)
    try:
        trainer = make_trainer(recipe, args, tokenizer, rows, task)
        checkpoint = from_main(partial(resumable, folder))
        before = seconds_until(checkpoint)
        trainer.started = time.monotonic() - before
        wait_for_safe_points()
        outcome = trainer.train(resume_from_checkpoint=_as_text(checkpoint))
        result = {
            "algorithm": recipe.trainer.algorithm,
            "rows": len(rows.train),
            "dropped": vars(rows.train.dropped) | rows.invalid,
            "steps": trainer.state.global_step,
            "seconds": before + outcome.metrics["train_runtime"],
        }
        with trainer.saved_on_early_end():
            trainer.safe_point()
            result |= _last_look(trainer, recipe)
            trainer.safe_point()
        save_final(trainer, recipe)
        if main:
            shutil.rmtree(folder / "weights", ignore_errors=True)  # what servers were pushed
            atomic_write(summary, json.dumps(result, indent=2) + "\n")
        trainer.accelerator.wait_for_everyone()  # the first to end takes the others along
    except ImportError as error:
        raise PrefoptError(f"a package is missing for this recipe: {error}") from error
    return result


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise PrefoptError(
            f"{path}: cannot be read ({error}); delete the file and run the same command again: "
            "it makes it from the last checkpoint"
        ) from error


def _last_look(trainer: CompleteCheckpoints, recipe: Recipe) -> dict[str, Any]:
    """What is said of a trained model in the summary."""
    result: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        report = JUDGE_REPORTS.get(recipe.trainer.algorithm)
        if report is not None:
            result[recipe.trainer.algorithm] = report(trainer)
        else:
            trainer.evaluate()
            last = trainer.state.log_history[-1]
            result["evaluation"] = {k: v for k, v in last.items() if k.startswith("eval_")}
    if isinstance(trainer, PairRoundTrainer):
        result["rounds"] = trainer.reports()
    if isinstance(trainer.evaluator, Evaluation):
        result["evaluations"] = trainer.evaluator.finish()
        if trainer.evaluator.stopped is not None:
            result["stopped"] = trainer.evaluator.stopped
    return result


def resumable(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, every file of it compared with its sum."""
    remove_leftovers(folder / "checkpoints")
    return last_complete_checkpoint(folder / "checkpoints", sums=True)


def make_config(recipe: Recipe) -> Any:
    """The trainer's arguments.

    Raises:
        PrefoptError: The values do not go together.
    """
    config_class, _ = ALGORITHMS[recipe.trainer.algorithm]
    folder = Path(recipe.run_dir)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    settings: dict[str, Any] = {
        "output_dir": str(folder / "checkpoints"),
        "seed": recipe.seed,
        # said outright, because several processes without a GPU are joined only then
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": bf16 and not recipe.trainer.options.get("fp16"),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,  # the bar is ours
        "log_level_replica": "error",  # as the main process, which is told by the command
        **trainer_options(recipe),
    }
    if in_rounds(recipe.trainer.algorithm):
        settings["rounds_dir"] = str(folder / "rounds")
        settings["generation_batch_size"] = recipe.rollout.batch_size
        for key in sorted(NEEDS_HELD_OUT_ROWS & settings.keys()):
            logger.info("trainer.%s is not used by %s", key, recipe.trainer.algorithm)
            del settings[key]
    if issubclass(config_class, TreeTrainerConfig):
        settings["log_probs_dir"] = str(folder / "log_probs")
        settings["max_prompt_length"] = recipe.data.max_prompt_length
        settings["max_length"] = recipe.data.max_length
    try:
        args = config_class(**settings)
    except (TypeError, ValueError, ImportError, OSError) as error:  # how it refuses values
        raise PrefoptError(f"trainer: {error}") from error
    if isinstance(args, RoundConfig):
        _check_judge_section(recipe, args)
        args.check_sampling(sampling_of(recipe))
    return args


def _check_judge_section(recipe: Recipe, args: RoundConfig) -> None:
    algorithm = recipe.trainer.algorithm
    if args.asks and recipe.judge is None:
        raise PrefoptError(
            f"{algorithm} has its samples judged: the recipe needs a section judge, such as "
            "judge: {kind: reward_model, path: runs/reward_model/final}"
        )
    only_scores = args.asks == ("score",)
    if only_scores and recipe.judge is not None and JUDGES[recipe.judge.kind].compares_only:
        raise PrefoptError(
            f"judge.kind: found {recipe.judge.kind}, which only compares answers to one prompt, "
            f"but {algorithm} needs a score of each by itself; use judge.kind reward_model, or an "
            "algorithm that compares (online_dpo, inpo, nash_mp)"
        )


def make_trainer(
    recipe: Recipe,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    task: EvaluationTask | None = None,
) -> CompleteCheckpoints:
    """Loads the model and builds the trainer of a recipe, evaluated as a task says."""
    algorithm = recipe.trainer.algorithm
    _, trainer_class = ALGORITHMS[algorithm]
    folder = Path(recipe.run_dir)
    for key in sorted(recipe.trainer.options.keys() - trainer_options(recipe).keys()):
        logger.info("trainer.%s is not used by %s", key, algorithm)
    datasets: list[Any] = [rows.train, rows.evaluation]
    as_dataset: Callable[..., Any] | None = {
        "sft": None,
        "preference_model": comparison_dataset,
    }.get(algorithm, pair_dataset)
    more: dict[str, Any] = {}
    if isinstance(args, RoundConfig):
        more = {"sampling": sampling_of(recipe)}
        if args.asks and recipe.judge is not None:
            with loaded_whole():
                judge = load_judge(**recipe.judge.model_dump(), device=args.device)
            more["judge"] = judge
    elif as_dataset is not None:
        datasets = [None if part is None else as_dataset(part) for part in datasets]
    model = _load_model(recipe, tokenizer, recipe.model.quantization)
    weights = "" if task is None else shared_fingerprint(model)  # before an adapter is added
    if isinstance(args, RoundConfig) and args.samples_drawn(recipe.rollout.samples_per_prompt):
        prompts, sampling = [rows.train.prompt_ids], list(more["sampling"])
        if task is not None:
            prompts.append(prompt_ids_of(task, tokenizer))
            sampling.append(task.sampling)
        longest = max(int(ids.lengths.max()) for ids in prompts)
        more["engine"] = make_engine(recipe, args, model, tokenizer, longest, sampling)
    try:
        trainer: CompleteCheckpoints = trainer_class(
            model,
            args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1],
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), ProgressBar(recipe.name)],
            **more,
        )
    except (ValueError, RuntimeError) as error:  # how transformers, PEFT, TRL refuse settings
        raise PrefoptError(f"{algorithm}: {error}") from error
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    start = partial(_load_model, recipe, tokenizer, recipe.model.quantization)
    if isinstance(trainer, TreeTrainer):
        trainer.load_start = start
    bounds = recipe.guards.model_dump(exclude={"over_optimisation"})
    BoundsGuard(trainer, Bounds(**bounds), folder / "guards.jsonl")
    if task is not None:
        Evaluation(trainer, replace(task, load_start=start), folder / "evaluations", weights)
    return trainer


def save_final(trainer: Trainer, recipe: Recipe) -> None:
    """Writes ``final/``: a plain Hugging Face model; an adapter is merged, and kept beside it.

    Raises:
        PrefoptError: The disk is full, or has no room for it.
    """
    folder = Path(recipe.run_dir)
    final, adapter = folder / "final", folder / "adapter"
    main = trainer.accelerator.is_main_process
    if recipe.model.lora is None:
        with _saved_whole(trainer, final) as partial:
            trainer.save_model(str(partial))
        return
    with _saved_whole(trainer, adapter) as partial:
        trainer.save_model(str(partial))
    with _saved_whole(trainer, final) as partial:
        if main:  # from disk, because in memory the model may be sharded
            from peft import PeftModel

            with loaded_whole():
                # never quantised: what an adapter adds would be lost in the steps of 4 or 8 bits
                base = _load_model(recipe, trainer.processing_class, quantization=None)
            merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
            merged.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)


@contextmanager
def _saved_whole(trainer: Trainer, path: Path) -> Iterator[Path]:
    """A folder, the same for all processes, that takes its name once all are through."""
    partial, main = path.with_name(f".{path.name}.partial"), trainer.accelerator.is_main_process
    whole = path.name == "final"
    size = weights_size(p for p in trainer.model.parameters() if whole or p.requires_grad)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)  # a killed process's
        check_space(path, size, path.name)

    from_main(begin)
    try:
        with writing(path, path.name):
            yield partial
            trainer.accelerator.wait_for_everyone()
            if main:
                # a pickle, of no use to readers
                (partial / "training_args.bin").unlink(missing_ok=True)
                put_in_place(partial, path)
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _load_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, quantization: str | None
) -> PreTrainedModel:
    model = recipe.model
    options: dict[str, Any] = {
        "dtype": model.dtype,
        "quantization": quantization,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
    if recipe.trainer.algorithm == "reward_model":
        return load_reward_model(model.path, tokenizer, new_head=True, **options)
    policy = load_policy(model.path, **options)
    # whoever generates with the result must stop at the template's end of turn too
    policy.generation_config.eos_token_id = stop_token_ids(tokenizer, policy.generation_config)
    return policy


def lora_config(recipe: Recipe) -> Any:
    """PEFT's configuration of the recipe's adapter, or None."""
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
