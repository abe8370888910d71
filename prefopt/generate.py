"""``prefopt generate``: a model's answers to a file of prompts."""

from __future__ import annotations

import argparse
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
from prefopt.rollout.engine import Completion, Done, Engine, SamplingSettings
from prefopt.rollout.hf_engine import TransformersEngine
from prefopt.rounds.store import write_lines


class Generator:
    """A model with its tokenizer that answers prompts given as text or messages.

    Args:
        model: A local folder or a Hub id.
        dtype: ``auto`` keeps the checkpoint's type; else float32, bfloat16 or float16.
        chat_template: A Jinja file that replaces the model's template.
        batch_size: Answers generated at a time.

    Raises:
        PrefoptError: The model or its tokenizer cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        chat_template: str | None = None,
        batch_size: int = 64,
    ) -> None:
        self.tokenizer = load_tokenizer(model, chat_template=chat_template)
        policy = load_policy(model, dtype=dtype)
        policy.to("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = TransformersEngine(policy, self.tokenizer, batch_size=batch_size)

    def answer(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings | Sequence[SamplingSettings],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """The completions of each prompt under a progress bar on stderr; see `Engine.generate`.

        Raises:
            PrefoptError: The tokenizer lacks what such prompts need, or a prompt is too long.
        """
        check_tokenizer(self.tokenizer, conversational=not isinstance(prompts[0], str))
        ids = tokenize_prompts(prompts, self.tokenizer, max_prompt_length=None).prompt_ids
        return generate_with_progress(self.engine, list(ids), settings, done)


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
    located = islice(read_rows(arguments.prompts, split=arguments.split), arguments.limit)
    prompts, _ = validate(located, parse_prompt)
    generator = Generator(
        arguments.model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        batch_size=arguments.batch_size,
    )
    answers = generator.answer(prompts, settings)
    write_completions(Path(arguments.out), prompts, answers)
    every = [answer for group in answers for answer in group]
    return {
        "prompts": len(answers),
        "completions": len(every),
        "mean_length": sum(len(a.token_ids) for a in every) / len(every),
        "finished": sum(a.finish_reason == "stop" for a in every) / len(every),
        "out": arguments.out,
    }


def generate_with_progress(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings | Sequence[SamplingSettings],
    done: Done | None = None,
) -> list[list[Completion]]:
    """``engine.generate`` under a rich progress bar on stderr."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("generate", total=len(prompts))

        def finished(index: int, completions: list[Completion]) -> None:
            bar.advance(task)
            if done is not None:
                done(index, completions)

        return engine.generate(prompts, settings, done=finished)


def write_completions(
    path: Path, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]
) -> None:
    """One JSON line an answer: prompt, sample, completion (text), finish_reason, tokens."""
    rows = [
        completion_row(prompt, sample, answer)
        for prompt, group in zip(prompts, answers, strict=True)
        for sample, answer in enumerate(group)
    ]
    write_lines(path, rows)


def completion_row(prompt: Prompt, sample: int, answer: Completion) -> dict[str, Any]:
    """A line of a file of answers."""
    return {
        "prompt": prompt,
        "sample": sample,
        "completion": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids),
    }
