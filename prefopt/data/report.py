"""What is in a data set, in numbers and in one example: the body of ``prefopt check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt.data.tokenize import Ragged, Tokenized, TokenizedPairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def data_report(
    tokenized: Tokenized,
    tokenizer: PreTrainedTokenizerBase,
    *,
    invalid: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Describes a tokenised data set.

    Args:
        tokenized: Pairs, comparisons, demonstrations or prompts; the text of prompts kept beside
            pairs or answers is not looked at.
        tokenizer: The tokenizer that made them.
        invalid: Bad rows by kind, as `prefopt.data.rows.validate` counts them.

    Returns:
        A dict of plain Python values:

        - ``rows``: how many can be trained on; ``invalid`` and ``dropped``: how many cannot, by
          reason;
        - ``tokens``: for ``prompt``, and ``chosen`` and ``rejected``, ``completion`` or
          ``answer``, the lengths ``p5``, ``p50``, ``p95``, ``p99`` (which that share of the rows
          does not exceed) and ``max``;
        - ``chosen_longer``: the share of pairs whose chosen answer has more tokens (pairs only;
          without a length bias it is about 0.5);
        - ``duplicates``: rows with the tokens of an earlier row elsewhere; the copies that a
          mixture's weight makes are not counted;
        - ``example``: ``where``, and for each answer a list of {"text", "loss", "special"}: the
          text that the model reads, whether it bears loss, and whether it is a special token;
          ``prompt`` where there are no answers.
    """
    columns = {
        name.removesuffix("_ids"): column
        for name, column in vars(tokenized).items()
        if isinstance(column, Ragged)
    }
    report: dict[str, Any] = {
        "rows": len(tokenized),
        "invalid": dict(invalid or {}),
        "dropped": {reason: n for reason, n in asdict(tokenized.dropped).items() if n},
        "tokens": {name: _percentiles(column) for name, column in columns.items()},
        "duplicates": _count_duplicates(list(columns.values()), tokenized.where),
        "example": _example(
            tokenized[0], tokenizer, [name for name in columns if name != "prompt"]
        ),
    }
    if isinstance(tokenized, TokenizedPairs):
        longer = tokenized.chosen_ids.lengths > tokenized.rejected_ids.lengths
        report["chosen_longer"] = float(longer.mean())
    return report


def _percentiles(column: Ragged) -> dict[str, int]:
    values = np.percentile(column.lengths, (5, 50, 95, 99, 100), method="inverted_cdf")
    return dict(zip(("p5", "p50", "p95", "p99", "max"), map(int, values), strict=True))


def _count_duplicates(columns: list[Ragged], where: list[str]) -> int:
    first_seen: dict[bytes, str] = {}
    places = set()
    for index, place in enumerate(where):
        rows = repr([column[index] for column in columns])
        if first_seen.setdefault(blake2b(rows.encode(), digest_size=16).digest(), place) != place:
            places.add(place)
    return len(places)


def _example(
    item: dict[str, Any], tokenizer: PreTrainedTokenizerBase, answers: list[str]
) -> dict[str, Any]:
    example: dict[str, Any] = {"where": item["where"]}
    if not answers:
        example["prompt"] = _pieces(tokenizer, item["prompt_ids"], [])
    for name in answers:
        example[name] = _pieces(tokenizer, item["prompt_ids"], item[f"{name}_ids"])
    return example


def _pieces(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], answer_ids: list[int]
) -> list[dict[str, Any]]:
    """What the model reads, cut where loss begins and around each special token."""
    ids = prompt_ids + answer_ids
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[dict[str, Any]] = []
    read, end = "", 0

    def kind(place: int) -> tuple[bool, bool, int]:
        known = ids[place] in special
        return place >= len(prompt_ids), known, place if known else -1

    for (loss, known, _), group in groupby(range(len(ids)), key=kind):
        end += sum(1 for _ in group)
        # Decoded from the start: SentencePiece-like tokenizers drop the space before a lone text.
        whole = _decode(tokenizer, ids[:end])
        pieces.append({"text": whole[len(read) :], "loss": loss, "special": known})
        read = whole
    return pieces


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
