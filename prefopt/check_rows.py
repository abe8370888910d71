"""The rows of a recipe as ``prefopt check`` reads them: every bad row, then what training reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefopt.data.findings import Findings
from prefopt.data.row_findings import Survey, prompt_key, survey_rows
from prefopt.data.rows import Prompt, prompt_text
from prefopt.data.text_findings import TextChecks
from prefopt.data.token_findings import (
    Limit,
    encodable,
    kind_of,
    length_differences,
    look_at_limits,
    look_at_tokenizer,
    look_for_cut_answers,
)
from prefopt.data.tokenize import Tokenized
from prefopt.errors import PrefoptError
from prefopt.eval.win_rate import wilson_interval
from prefopt.recipe import Recipe
from prefopt.train import (
    Rows,
    held_out_rows,
    in_rounds,
    row_parser,
    split_by_prompt,
    tokenizer_of_rows,
    training_rows,
)
from prefopt.trainers.round_config import RoundConfig
from prefopt.trainers.round_rows import prompt_limit

LENGTH_RULE, PAIRS = 0.6, 20  # accuracy of a length rule that is good, and pairs that show it


def look_at_rows(
    recipe: Recipe, args: Any, tokenizer: PreTrainedTokenizerBase | None, findings: Findings
) -> tuple[Rows | None, list[Any]]:
    """Reads, looks at and tokenises the rows of a recipe.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        tokenizer: The policy's; None where it could not be loaded.
        findings: Where problems go.

    Returns:
        What training would read, or None where nothing is left; and the parsed training rows.
    """
    data, parse = recipe.data, row_parser(recipe, args)
    checks = TextChecks(tokenizer)
    train, held_out = Survey(), Survey()
    with findings.of("source"):
        train = survey_rows(
            training_rows(recipe), parse, findings, checks, invalid=data.invalid_rows
        )
    with findings.of("source"):
        if (located := held_out_rows(recipe)) is not None:
            held_out = survey_rows(located, parse, findings, checks, invalid=data.invalid_rows)
    items, others = train.items, held_out.items
    if data.eval_fraction and items:
        try:
            items, others = split_by_prompt(items, data.eval_fraction, recipe.seed)
        except PrefoptError as error:
            findings.add("no rows left", str(error))
            return None, items
    elif in_rounds(recipe.trainer.algorithm):
        others = []  # nothing is measured on them
    items = items[: data.max_rows]
    _look_for_overlap(items, others, findings)
    _look_at_forms(items, findings)
    if not items:
        if not findings.count("error"):
            findings.add("no rows left", "no row is good")
        return None, items
    if tokenizer is None:
        return None, items
    prompts = (item.prompt for item in (*items, *others))
    if not look_at_tokenizer(tokenizer, prompts, findings):
        return None, items
    kept = _tokenised(recipe, args, tokenizer, items, findings)
    if kept is None:
        return None, items
    look_at_limits(kept, *_limits(recipe, args), findings)
    look_for_cut_answers(kept, tokenizer, findings)
    evaluation = None
    if others and not in_rounds(recipe.trainer.algorithm):
        evaluation = _tokenised(recipe, args, tokenizer, others, findings)
    invalid = {
        kind: train.invalid.get(kind, 0) + held_out.invalid.get(kind, 0)
        for kind in train.invalid | held_out.invalid
    }
    return Rows(kept, evaluation, invalid), items


def bias_of(rows: Tokenized, findings: Findings) -> dict[str, float] | None:
    """How much longer chosen answers are (`length_bias`), of pairs."""
    differences = length_differences(rows)
    return None if differences is None else length_bias(differences, findings)


def length_bias(differences: Any, findings: Findings) -> dict[str, float]:
    """How much longer chosen answers are, and how well "the longer one is chosen" predicts.

    Args:
        differences: Tokens of chosen minus those of rejected, int [pairs].
        findings: Where a rule that is good goes.

    Returns:
        ``mean`` and its ``standard_error`` in tokens; ``accuracy`` of the rule, equal lengths
        counting half, with a 95 % Wilson interval from ``low`` to ``high``.
    """
    pairs = len(differences)
    accuracy = float(np.mean(np.sign(differences) / 2 + 0.5))
    low, high = wilson_interval(accuracy, pairs)
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1) / math.sqrt(pairs)) if pairs > 1 else math.nan
    if pairs >= PAIRS and (low > LENGTH_RULE or high < 1 - LENGTH_RULE):
        longer = low > LENGTH_RULE
        right, least, most = (accuracy, low, high) if longer else (1 - accuracy, 1 - high, 1 - low)
        findings.add(
            "length rule",
            f"the {'longer' if longer else 'shorter'} answer is chosen in {right:.1%} of {pairs:,} "
            f"pairs (95 % interval {least:.1%} to {most:.1%}); chosen minus rejected is "
            f"{mean:+.1f} tokens (standard error {error:.1f})",
        )
    return {
        "mean": mean,
        "standard_error": 0.0 if math.isnan(error) else error,
        "accuracy": accuracy,
        "low": low,
        "high": high,
    }


def look_for_evaluated(items: Iterable[Any], prompts: Iterable[Prompt], findings: Findings) -> None:
    """Looks for prompts of the section ``eval`` that are trained on."""
    asked = {prompt_key(prompt): prompt for prompt in prompts}
    found: dict[bytes, str] = {}
    for item in items:
        if (key := prompt_key(item.prompt)) in asked:
            found.setdefault(key, item.where)
    for key, where in found.items():
        findings.add(
            "evaluation overlap",
            f"eval.prompts has this training prompt too: {prompt_text(asked[key])[:60]!r}",
            where,
        )


def _look_for_overlap(items: list[Any], others: list[Any], findings: Findings) -> None:
    """Held-out rows whose prompt is trained on."""
    if not others:
        return
    trained = {prompt_key(item.prompt): item.where for item in reversed(items)}
    for item in others:
        if (where := trained.get(prompt_key(item.prompt))) is not None:
            findings.add("eval overlap", f"the prompt of {where} is held out too", item.where)


def _look_at_forms(items: list[Any], findings: Findings) -> None:
    """Plain texts among conversations, or the other way round: one of the two is a mistake."""
    plain = [item for item in items if isinstance(item.prompt, str)]
    talks = [item for item in items if not isinstance(item.prompt, str)]
    found = f"{len(plain):,} rows are plain text and {len(talks):,} conversations"
    for item in min(plain, talks, key=len):
        findings.add("text beside conversations", found, item.where)


def _tokenised(
    recipe: Recipe,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    items: list[Any],
    findings: Findings,
) -> Tokenized | None:
    """Token ids within the limits; where training would stop at a row, those of the others."""
    tokenize = tokenizer_of_rows(recipe, tokenizer, args)
    kept: Tokenized | None = None
    try:
        kept = tokenize(items)
    except PrefoptError as error:
        good = encodable(tokenizer, items, findings)
        if not good or len(good) == len(items):
            findings.add(kind_of(error), str(error))
            return None
        with findings.of("no rows left"):
            kept = tokenize(good)
    return kept


def _limits(recipe: Recipe, args: Any) -> tuple[Limit, Limit]:
    """Those on prompts and on prompts with answers."""
    data, sampled = recipe.data, recipe.rollout.max_new_tokens
    prompt = Limit(data.max_prompt_length, "data.max_prompt_length")
    if isinstance(args, RoundConfig):
        most = prompt_limit(prompt.tokens, data.max_length, sampled)
        if most != prompt.tokens:  # what is left beside a sample
            prompt = Limit(most, "data.max_length", sampled)
    return prompt, Limit(data.max_length, "data.max_length")
