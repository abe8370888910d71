"""What configurations and tokenizers of the policy and its judges say, without any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from prefopt.data.findings import Findings, Severity
from prefopt.data.template import check_tokenizer
from prefopt.data.token_findings import whole_lengths
from prefopt.data.tokenize import Ragged, Tokenized
from prefopt.errors import PrefoptError
from prefopt.evaluation_recipe import (
    NO_POLICY,
    api_of,
    asks_in_training,
    judge_section,
    trains_with,
)
from prefopt.models.load import (
    check_quantization,
    check_weights,
    load_config,
    load_tokenizer,
)
from prefopt.recipe import EvalJudgeSection, JudgeSection, Recipe
from prefopt.reward_models.preference_model import ComparisonEncoder
from prefopt.rollout.vllm_process import check_installed
from prefopt.trainers.round_config import RoundConfig


def look_at_machine(recipe: Recipe, args: Any, elsewhere: bool, findings: Findings) -> None:
    """Looks for what the recipe needs of the machine.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        elsewhere: Whether the run is meant for another machine, so that nothing is refused here.
        findings: Where problems go.
    """
    severity: Severity = "warning" if elsewhere else "error"
    if isinstance(args, RoundConfig) and recipe.rollout.engine == "vllm":
        with findings.of("machine", severity):
            check_installed("rollout.engine")
    if recipe.judge is not None and asks_in_training(recipe) and recipe.judge.engine == "vllm":
        with findings.of("machine", severity):
            check_installed("judge.engine")
    with findings.of("machine", severity):
        check_quantization(recipe.model.quantization)


# --- judges --------------------------------------------------------------------------------------


def look_at_judges(
    recipe: Recipe,
    args: Any,
    policy: PreTrainedTokenizerBase | None,
    longest: int | None,
    conversational: bool,
    findings: Findings,
) -> None:
    """Looks at the judge that training asks and at that of evaluations.

    Args:
        recipe: The recipe.
        args: The trainer's arguments.
        policy: The policy's tokenizer, where there is one.
        longest: Tokens of the longest prompt with an answer, where they are known.
        conversational: Whether prompts are conversations.
        findings: Where problems go.
    """
    judges: list[tuple[str, JudgeSection | EvalJudgeSection]] = []
    if recipe.judge is not None and asks_in_training(recipe):
        judges.append(("judge", recipe.judge))
    if recipe.eval is not None and recipe.trainer.algorithm not in NO_POLICY:
        with findings.of("judge"):
            judge = judge_section(recipe)
            if judge.kind == "api":
                api_of(judge, Path(recipe.run_dir))
            elif trains_with(recipe):
                findings.add("same judge", f"eval.judge: training asks {judge.path} too")
            else:
                judges.append(("eval.judge", judge))
    for name, section in judges:
        _look_at_judge(name, section, policy, longest, conversational, findings)


def _look_at_judge(
    name: str,
    section: JudgeSection | EvalJudgeSection,
    policy: PreTrainedTokenizerBase | None,
    longest: int | None,
    conversational: bool,
    findings: Findings,
) -> None:
    path = str(section.path)
    try:
        tokenizer = load_tokenizer(path)
    except PrefoptError as error:
        findings.add("judge", f"{name}.path: {error}")
        return
    config = _config(path)
    with findings.of("judge"):
        check_weights(path)
        if section.kind == "reward_model":
            _check_score(name, path, config)
    try:
        check_tokenizer(tokenizer, conversational=conversational)
        if section.kind == "preference_model":
            ComparisonEncoder(tokenizer)
    except PrefoptError as error:
        findings.add("judge template", f"{name}: {error}")
    # a reward model may have a pad token more
    if policy is not None and not policy.get_vocab().items() <= tokenizer.get_vocab().items():
        findings.add("judge tokenizer", f"{name}: {path} has another vocabulary than the policy")
    most = _context(config)
    if longest is not None and most is not None and longest > most:
        found = f"{name}: reads up to {most:,} tokens; a prompt with its answer has up to"
        findings.add("judge context", f"{found} {longest:,} of the policy's")


def _check_score(name: str, path: str, config: PreTrainedConfig | None) -> None:
    kinds = getattr(config, "architectures", None) or []
    adapter = (Path(path) / "adapter_config.json").exists()  # which may bring a head
    if not adapter and any(kind.endswith("ForCausalLM") for kind in kinds):
        raise PrefoptError(
            f"{name}.path: {path} is a language model ({', '.join(kinds)}) and has no score; "
            "expected a sequence classifier as algorithm reward_model makes it"
        )


# --- the policy ----------------------------------------------------------------------------------


def look_for_model(recipe: Recipe, findings: Findings) -> PreTrainedConfig | None:
    """Looks whether the policy's configuration and weights are there; returns the former."""
    model = recipe.model
    config: PreTrainedConfig | None = None
    with findings.of("model"):
        config = load_config(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        check_weights(model.path)
    return config


def longest_row(recipe: Recipe, args: Any, rows: Tokenized) -> int:
    """Tokens of the longest prompt with an answer, of a sample as long as it may be."""
    longest = int(whole_lengths(rows).max())
    if isinstance(args, RoundConfig) and args.samples_drawn(recipe.rollout.samples_per_prompt):
        sampled = int(rows.prompt_ids.lengths.max()) + recipe.rollout.max_new_tokens
        return max(longest, sampled)
    return longest


def look_at_policy(
    recipe: Recipe,
    config: PreTrainedConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Tokenized,
    longest: int,
    findings: Findings,
) -> None:
    """Compares the policy's context and vocabulary with what it will read."""
    if config is None:
        return  # an error already
    text = config.get_text_config()
    most = _context(config)
    if most is not None and longest > most:
        # rotary positions go on, at a loss; a table of positions ends
        rotary = getattr(text, "rope_parameters", None) is not None
        kind = "context" if rotary else "context exceeded"
        found = f"the model was made for {most:,} tokens; a row has up to {longest:,}"
        findings.add(kind, f"{found}, prompt and answer together")
    if recipe.trainer.algorithm == "reward_model":
        return  # its embedding is made larger
    columns = [c for c in vars(rows).values() if isinstance(c, Ragged)]
    largest = max(int(np.asarray(c.to_arrow().values).max(initial=0)) for c in columns)
    if largest >= text.vocab_size:
        found = f"rows have the token id {largest:,}"
        findings.add(
            "ids without embedding", f"{found}; the model has embeddings for {text.vocab_size:,}"
        )
    elif len(tokenizer) > text.vocab_size:
        found = f"the tokenizer has {len(tokenizer):,} tokens, the model {text.vocab_size:,}"
        findings.add("vocabulary", f"{found}; no row uses those beyond")


def _config(path: str) -> PreTrainedConfig | None:
    try:
        return load_config(path)
    except PrefoptError:
        return None


def _context(config: PreTrainedConfig | None) -> int | None:
    if config is None:
        return None
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) else None
