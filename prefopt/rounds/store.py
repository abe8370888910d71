"""The files of a round: what was sampled, what the judge said, and the pairs made of it.

    rounds/0003/
        draw-0/rollouts-00000.parquet      one row a sample
        draw-0/judgements-00000.jsonl      one line a prompt
        draw-1/...                         new samples for prompts whose first ones tied
        pairs.jsonl                        of a round of pairs: preference pairs (``docs/data.md``)
        round.json                         counts and means; written last

Each file appears whole or not at all, so that a file that is there is complete; its sum lies beside
it (:mod:`prefopt.rounds.sums`) and is compared when it is read. A prompt is known by its position
in the round.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefopt.errors import PrefoptError
from prefopt.rollout.engine import Completion
from prefopt.rounds.judging import Judgement
from prefopt.rounds.storage import atomic_write
from prefopt.rounds.sums import read_summed, write_summed

RESTORE = (
    "restore this file, or, if nothing was trained on its round yet, delete the folder of its "
    "round and run the same command again"
)


@dataclass(frozen=True)
class Sample:
    """A completion, the temperature it was drawn at, and how many of its tokens were forced."""

    completion: Completion
    temperature: float
    forced: int = 0


def round_folder(rounds_dir: Path, index: int) -> Path:
    """Where a round lies, counted from 0."""
    return rounds_dir / f"{index:04d}"


def rollouts_path(folder: Path, draw: int, shard: int) -> Path:
    """The samples of a shard."""
    return folder / f"draw-{draw}" / f"rollouts-{shard:05d}.parquet"


def judgements_path(folder: Path, draw: int, shard: int) -> Path:
    """What the judge said of a shard."""
    return folder / f"draw-{draw}" / f"judgements-{shard:05d}.jsonl"


def write_rollouts(path: Path, samples: Mapping[int, Sequence[Sample]]) -> None:
    """Stores the samples of a shard's prompts, by position in the round."""
    rows = [
        {
            "position": position,
            "sample": number,
            "token_ids": sample.completion.token_ids,
            "text": sample.completion.text,
            "finish_reason": sample.completion.finish_reason,
            "temperature": sample.temperature,
            "forced": sample.forced,
            "log_prob": sample.completion.log_prob,
        }
        for position, group in samples.items()
        for number, sample in enumerate(group)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_ROLLOUTS), sink, compression="zstd")
    write_summed(path, sink.getvalue().to_pybytes())


_ROLLOUTS = pa.schema(
    {
        "position": pa.int32(),
        "sample": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "temperature": pa.float64(),
        "forced": pa.int32(),
        "log_prob": pa.float64(),
    }
)


def read_rollouts(path: Path) -> dict[int, list[Sample]]:
    """The samples that :func:`write_rollouts` stored.

    Raises:
        PrefoptError: The file cannot be read.
    """
    try:
        content = pa.BufferReader(read_summed(path, RESTORE))
        rows = pq.read_table(content, schema=_ROLLOUTS).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    samples: dict[int, list[Sample]] = {}
    for row in rows:
        completion = Completion(
            row["token_ids"], row["text"], row["finish_reason"], row["log_prob"]
        )
        sample = Sample(completion, row["temperature"], row["forced"])
        samples.setdefault(row["position"], []).append(sample)
    return samples


def write_judgements(path: Path, judgements: Mapping[int, Judgement]) -> None:
    """Stores what the judge said of a shard's prompts, by position."""
    rows = ({"position": p, **asdict(j)} for p, j in judgements.items())
    write_summed(path, json_lines(rows))


def read_judgements(path: Path) -> dict[int, Judgement]:
    """What :func:`write_judgements` stored.

    Raises:
        PrefoptError: The file cannot be read.
    """
    try:
        return {
            row["position"]: Judgement(
                scores=row["scores"], matches=[(i, j, p) for i, j, p in row["matches"]]
            )
            for row in read_lines(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Stores rows as JSON lines; numbers come back as they were, to the last bit."""
    atomic_write(path, json_lines(rows))


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a file of JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path, otherwise: str = RESTORE) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Args:
        path: The file.
        otherwise: What to do where it is damaged, for the error.

    Raises:
        PrefoptError: The file cannot be read, or has a sum that is not its own.
    """
    try:
        text = read_summed(path, otherwise).decode()
        rows = [json.loads(line) for line in text.split("\n") if line]
    except (OSError, RecursionError, ValueError) as error:
        raise _unreadable(path, error, otherwise) from error
    if not all(isinstance(row, dict) for row in rows):
        raise _unreadable(path, "found JSON that is no object", otherwise)
    return rows


def _unreadable(path: Path, error: Exception | str, otherwise: str = RESTORE) -> PrefoptError:
    return PrefoptError(f"{path}: cannot be read ({error}); {otherwise}")
