"""What a recipe's section ``eval`` asks for: its prompts, its baseline, its judge, how often."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from prefopt.data.rows import Prompt, prompt_text
from prefopt.errors import PrefoptError
from prefopt.eval.answers import read_answers, read_prompts
from prefopt.evaluation import EvaluationTask
from prefopt.evaluation_alarm import NOT_WATCHED
from prefopt.judge import Judge
from prefopt.models.load import load_tokenizer, loaded_whole
from prefopt.recipe import EvalJudgeSection, EvalSection, Recipe
from prefopt.reward_models import load_judge
from prefopt.reward_models.api_judge import ApiJudge
from prefopt.reward_models.chat_api import ChatAPI
from prefopt.rollout.engine import SamplingSettings
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.rounds import judge_fingerprint
from prefopt.trainers.sample_rounds import SampleRoundConfig

logger = logging.getLogger(__name__)

NO_POLICY = ("reward_model", "preference_model")  # algorithms that train a judge
SHARE = 10  # evaluations of a run in rounds of samples, unless it says how many


@dataclass(frozen=True)
class EvaluationData:
    """The texts of an evaluation.

    Attributes:
        prompts: Each once.
        baseline: The answers in the baseline's file, one a prompt; None without a file.
    """

    prompts: list[Prompt]
    baseline: list[str] | None


def read_evaluation(recipe: Recipe) -> EvaluationData | None:
    """Reads what a recipe's evaluation needs, and looks whether its judge is there.

    Returns:
        None where the recipe asks for none, or trains what answers no prompt.

    Raises:
        PrefoptError: A file cannot be read, the baseline does not answer all prompts, or there is
            no judge, or it is not there.
    """
    section = recipe.eval
    if section is None:
        if recipe.guards.over_optimisation and asks_in_training(recipe):
            logger.info(NOT_WATCHED, "the recipe has no section eval")
        return None
    if recipe.trainer.algorithm in NO_POLICY:
        logger.info("eval is not used by %s", recipe.trainer.algorithm)
        return None
    data = read_evaluation_data(section)
    check_evaluation_judge(recipe)
    return data


def read_evaluation_data(section: EvalSection) -> EvaluationData:
    """Reads the prompts, each once, and the baseline's answers to them.

    Raises:
        PrefoptError: A file cannot be read, or the baseline does not answer all prompts.
    """
    try:
        read = read_prompts(section.prompts, section.split, section.max_prompts)
    except PrefoptError as error:
        raise PrefoptError(f"eval.prompts: {error}") from error
    prompts = list({_key(prompt): prompt for prompt in read}.values())
    if len(prompts) < len(read):
        logger.info("eval.prompts: %d that recur are used once", len(read) - len(prompts))
    if section.baseline is None:
        return EvaluationData(prompts, None)
    try:
        answers = read_answers(section.baseline).by_key()
    except PrefoptError as error:
        raise PrefoptError(f"eval.baseline: {error}") from error
    missing = [prompt for prompt in prompts if (_key(prompt), 0) not in answers]
    if missing:
        there = (_key(_other_form(missing[0])), 0) in answers
        form = "plain text" if isinstance(missing[0], str) else "a conversation"
        raise PrefoptError(
            f"eval.baseline: {section.baseline} has no answer to {len(missing)} of the "
            f"{len(prompts)} prompts in {section.prompts}, such as "
            f"{prompt_text(missing[0])[:60]!r}; expected one to each"
            + (f" (only the prompt in {section.prompts} is {form}; use one form)" if there else "")
        )
    return EvaluationData(prompts, [answers[_key(prompt), 0].text for prompt in prompts])


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True)


def _other_form(prompt: Prompt) -> Prompt:
    """Plain text as a conversation of one turn, and the reverse."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt_text(prompt)


# --- the judge -----------------------------------------------------------------------------------


def check_evaluation_judge(recipe: Recipe) -> None:
    """Looks whether the judge is there, and says where its win rates are to be taken with care.

    Raises:
        PrefoptError: There is none, the key of an API is not set, or a folder holds no tokenizer.
    """
    judge = judge_section(recipe)
    if judge.kind == "api":
        api_of(judge, Path(recipe.run_dir))
        return
    try:
        load_tokenizer(str(judge.path))
    except PrefoptError as error:
        raise PrefoptError(f"eval.judge.path: {error}") from error
    if same_judge(recipe):
        logger.warning(
            "eval.judge: %s is the judge that training asks too; its win rates are optimistic, "
            "since the policy learns to please it",
            judge.path,
        )
        if recipe.guards.over_optimisation:
            logger.warning(NOT_WATCHED, "eval.judge is the judge that training asks")


def judge_section(recipe: Recipe) -> EvalJudgeSection:
    """The judge of evaluations: their own, or the recipe's.

    Raises:
        PrefoptError: There is neither.
    """
    assert recipe.eval is not None
    own, judge = recipe.eval.judge, recipe.judge
    if own is not None:
        return own
    if judge is None:
        raise PrefoptError(
            "eval: found no judge; expected a section eval.judge, such as judge: {kind: "
            "reward_model, path: runs/reward_model/final}, or a section judge of the recipe"
        )
    return EvalJudgeSection(kind=judge.kind, path=judge.path, dtype=judge.dtype)


def asks_in_training(recipe: Recipe) -> bool:
    """Whether training asks the recipe's judge."""
    from prefopt.trainers import TRAINERS

    trainer = TRAINERS.get(recipe.trainer.algorithm)
    return (
        recipe.judge is not None and trainer is not None and bool(getattr(trainer[0], "asks", ()))
    )


def same_judge(recipe: Recipe) -> bool:
    """Whether the judge of evaluations is the one that training asks, in whatever precision."""
    judge, own = recipe.judge, judge_section(recipe)
    if judge is None or not asks_in_training(recipe):
        return False
    same_path = os.path.abspath(str(own.path)) == os.path.abspath(judge.path)
    return same_path and own.kind == judge.kind


def trains_with(recipe: Recipe) -> bool:
    """Whether evaluations take the very judge that training asks, as it is loaded there."""
    dtype = judge_section(recipe).dtype
    return same_judge(recipe) and recipe.judge is not None and dtype == recipe.judge.dtype


def load_for_evaluation(recipe: Recipe, trainer: Trainer) -> tuple[Judge, dict[str, Any]]:
    """The judge of evaluations with its record: the one training asks, or one that is loaded."""
    section = judge_section(recipe)
    if section.kind == "api":
        api_judge = ApiJudge(api_of(section, Path(recipe.run_dir)))
        return api_judge, api_judge.describe()
    judge: Judge | None = getattr(trainer, "judge", None) if trains_with(recipe) else None
    if judge is None:
        with loaded_whole():
            judge = load_judge(
                section.kind, str(section.path), dtype=section.dtype, device=trainer.args.device
            )
    weights = judge_fingerprint(judge)
    return judge, {"kind": section.kind, "path": section.path, "weights": weights}


def api_of(section: EvalJudgeSection, run_dir: Path) -> ChatAPI:
    """The client of an API; what it answers is kept in the run folder.

    Raises:
        PrefoptError: The key is missing, or the address is none.
    """
    try:
        return ChatAPI(
            str(section.model),
            base_url=section.base_url,
            key_variable=section.key_variable,
            cache=run_dir / "evaluations" / "api_answers.jsonl",
            concurrency=section.concurrency,
        )
    except PrefoptError as error:
        raise PrefoptError(f"eval.judge: {error}") from error


# --- how often -----------------------------------------------------------------------------------


def evaluation_task(
    recipe: Recipe, data: EvaluationData, args: Any, rounds: Sequence[int]
) -> EvaluationTask:
    """What a recipe asks for, for a trainer.

    Args:
        recipe: The recipe, with a section ``eval``.
        data: Its texts.
        args: The trainer's arguments.
        rounds: Prompts of each round; empty for an algorithm without rounds.

    Raises:
        PrefoptError: There is no judge, or two keys want different policies at the end.
    """
    section = recipe.eval
    assert section is not None
    judge_section(recipe)
    if section.stop_on_drop is not None and args.load_best_model_at_end:
        raise PrefoptError(
            "eval.stop_on_drop: found with trainer.load_best_model_at_end, which would put another "
            "policy in place of the one that was evaluated last; set one of them to null or false"
        )
    return EvaluationTask(
        prompts=data.prompts,
        judge=lambda trainer: load_for_evaluation(recipe, trainer),
        every=evaluated_every(section, args, len(rounds)),
        sampling=evaluation_sampling(recipe),
        baseline=data.baseline,
        baseline_name=section.baseline or "start",
        stop_on_drop=section.stop_on_drop,
        watch=recipe.guards.over_optimisation and not same_judge(recipe),
        batch_size=recipe.rollout.batch_size,
    )


def evaluation_sampling(recipe: Recipe) -> SamplingSettings:
    """How the policy answers; the same noise in every evaluation."""
    assert recipe.eval is not None
    return SamplingSettings(
        max_new_tokens=recipe.eval.max_new_tokens or recipe.rollout.max_new_tokens,
        temperature=recipe.eval.temperature,
        seed=recipe.seed,
    )


def evaluated_every(section: EvalSection, args: Any, rounds: int) -> int:
    """Rounds or epochs between two evaluations."""
    small_rounds = isinstance(args, SampleRoundConfig)
    return section.every or (math.ceil(rounds / SHARE) if small_rounds else 1)


def evaluation_report(
    recipe: Recipe, data: EvaluationData, args: Any, rows: int, rounds: Sequence[int]
) -> dict[str, Any]:
    """How much is to be answered and compared, if training does not end early.

    Args:
        recipe: The recipe.
        data: Its texts.
        args: The trainer's arguments.
        rows: Rows to train on.
        rounds: Prompts of each round.

    Returns:
        ``prompts``; ``every`` so many ``unit``; ``evaluations``; ``answers`` of the policy,
        its start's too; ``comparisons``.
    """
    assert recipe.eval is not None
    every = evaluated_every(recipe.eval, args, len(rounds))
    parts = len(rounds)
    if not isinstance(args, RoundConfig):
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        steps = math.ceil(rows / (batch * args.world_size))
        epochs = args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs
        parts = math.ceil(epochs)
    evaluations = math.ceil(parts / every) + (data.baseline is not None)
    start = data.baseline is None  # over a file the start is evaluated too
    return {
        "prompts": len(data.prompts),
        "every": every,
        "unit": "round" if isinstance(args, RoundConfig) else "epoch",
        "evaluations": evaluations,
        "answers": (evaluations + start) * len(data.prompts),
        "comparisons": evaluations * len(data.prompts),
    }
