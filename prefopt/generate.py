"""``prefopt generate``: a model's answers to a file of prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
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
from prefopt.rounds.log_probs import weights_fingerprint
from prefopt.rounds.storage import append, atomic_write, digest, read_appended
from prefopt.rounds.store import json_lines, write_lines


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

    Until all are answered, what there is lies beside the file: a killed process's successor goes on
    from there.

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
    out = Path(arguments.out)
    if out.is_dir():
        raise PrefoptError(f"--out: {arguments.out} is a folder, expected a file to write")
    located = islice(read_rows(arguments.prompts, split=arguments.split), arguments.limit)
    prompts, _ = validate(located, parse_prompt)
    generator = Generator(
        arguments.model,
        dtype=arguments.dtype,
        chat_template=arguments.chat_template,
        batch_size=arguments.batch_size,
    )
    kept = out.with_name(f".{out.name}.unfinished.jsonl")
    groups, _ = sample_to_file(generator, prompts, settings, kept)
    every = [row for group in groups for row in group]
    write_lines(out, ({k: v for k, v in row.items() if k != "index"} for row in every))
    for path in (kept, _record_path(kept)):
        path.unlink()
    return {
        "prompts": len(groups),
        "completions": len(every),
        "mean_length": sum(row["tokens"] for row in every) / len(every),
        "finished": sum(row["finish_reason"] == "stop" for row in every) / len(every),
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


def sample_to_file(
    generator: Generator,
    prompts: Sequence[Prompt],
    settings: SamplingSettings | Sequence[SamplingSettings],
    path: Path,
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Has a model answer prompts; what it has answered survives a killed process.

    Args:
        generator: The model.
        prompts: The prompts.
        settings: How to decode: the same for all prompts, or one for each.
        path: JSON lines as `prefopt generate` writes them, with the prompt's ``index``. A line is
            added as soon as a prompt is answered, and not asked for again. Beside it,
            ``NAME.decoding.json`` says what made them.

    Returns:
        The rows of each prompt's answers, and what made them.

    Raises:
        PrefoptError: The file holds answers of another model, to other prompts or otherwise
            decoded.
    """
    parts = [settings] if isinstance(settings, SamplingSettings) else list(settings)
    record = {
        "weights": weights_fingerprint(generator.engine.model),
        "prompts": digest(prompts),
        "sampling": [asdict(part) for part in dict.fromkeys(parts)],
        "chat_template": generator.tokenizer.chat_template,
    }
    stated = _record_path(path)
    if stated.exists() and path.exists():
        _check_record(path, _read_record(stated), record)
    else:
        path.unlink(missing_ok=True)
        atomic_write(stated, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    each = parts * len(prompts) if len(parts) == 1 else parts
    groups = _read_answered(path, [part.samples_per_prompt for part in each])
    missing = [index for index in range(len(prompts)) if index not in groups]
    if missing:
        _write_rows(path, groups)

        def keep(position: int, completions: list[Completion]) -> None:
            index = missing[position]
            groups[index] = [
                {"index": index, **completion_row(prompts[index], sample, completion)}
                for sample, completion in enumerate(completions)
            ]
            append(path, json_lines(groups[index]))

        generator.answer(
            [prompts[index] for index in missing], [each[index] for index in missing], done=keep
        )
        _write_rows(path, groups)
    return [groups[index] for index in range(len(prompts))], record


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.decoding.json")


def _write_rows(path: Path, groups: dict[int, list[dict[str, Any]]]) -> None:
    write_lines(path, (row for index in sorted(groups) for row in groups[index]))


def _read_record(stated: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(stated.read_text()))
    except (ValueError, TypeError) as error:
        raise PrefoptError(
            f"{stated}: cannot be read ({error}); restore the file, or delete it to begin again"
        ) from error


def _check_record(path: Path, found: dict[str, Any], record: dict[str, Any]) -> None:
    different = sorted(key for key in record if found.get(key) != record[key])
    if different:
        raise PrefoptError(
            f"{path}: these answers were made with other {', '.join(different)}; delete the file "
            "to make them anew, or choose another --out"
        )


def _read_answered(path: Path, samples: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """The prompts that a file answers with as many samples as they are to have."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in read_appended(path, index=int, completion=str, finish_reason=str, tokens=int):
        groups.setdefault(row["index"], []).append(row)
    return {i: groups[i] for i, count in enumerate(samples) if len(groups.get(i, ())) == count}


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
