"""``prefopt generate``: a model's answers to a file of prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from prefopt.data.rows import Prompt, parse_prompt, validate
from prefopt.data.sources import read_rows
from prefopt.data.template import check_tokenizer
from prefopt.data.tokenize import tokenize_prompts
from prefopt.errors import PrefoptError
from prefopt.models.load import load_policy, load_tokenizer
from prefopt.rollout.engine import Completion, Engine, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.storage import atomic_write


def generate_file(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answers the prompts of a file and writes one JSON line an answer.

    Raises:
        PrefoptError: The model, the prompts or a setting is wrong.
    """
    settings = SamplingSettings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        samples_per_prompt=arguments.samples,
        seed=arguments.seed,
    )
    if Path(arguments.out).is_dir():
        raise PrefoptError(f"--out: {arguments.out} is a folder, expected a file to write")
    tokenizer = load_tokenizer(arguments.model, chat_template=arguments.chat_template)
    located = islice(read_rows(arguments.prompts, split=arguments.split), arguments.limit)
    prompts, _ = validate(located, parse_prompt)
    check_tokenizer(tokenizer, conversational=not isinstance(prompts[0], str))
    tokenized = tokenize_prompts(prompts, tokenizer, max_prompt_length=None)
    model = load_policy(arguments.model, dtype=arguments.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    engine = TransformersEngine(model, tokenizer, batch_size=arguments.batch_size)
    answers = generate_with_progress(engine, list(tokenized.prompt_ids), settings)
    write_completions(Path(arguments.out), tokenized.prompt, answers)
    every = [answer for group in answers for answer in group]
    return {
        "prompts": len(answers),
        "completions": len(every),
        "mean_length": sum(len(a.token_ids) for a in every) / len(every),
        "finished": sum(a.finish_reason == "stop" for a in every) / len(every),
        "out": arguments.out,
    }


def generate_with_progress(
    engine: Engine, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> list[list[Completion]]:
    """``engine.generate`` under a rich progress bar on stderr."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        total = len(prompts) * settings.samples_per_prompt
        task = bar.add_task("generate", total=total)
        return engine.generate(prompts, settings, done=lambda _, done: bar.advance(task, len(done)))


def write_completions(
    path: Path, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]
) -> None:
    """One JSON line an answer: prompt, sample, completion (text), finish_reason, tokens."""
    lines = [
        json.dumps(
            {
                "prompt": prompt,
                "sample": sample,
                "completion": answer.text,
                "finish_reason": answer.finish_reason,
                "tokens": len(answer.token_ids),
            },
            ensure_ascii=False,
        )
        for prompt, group in zip(prompts, answers, strict=True)
        for sample, answer in enumerate(group)
    ]
    atomic_write(path, "".join(line + "\n" for line in lines))
