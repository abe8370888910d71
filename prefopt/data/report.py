"""What is in a data set, in numbers and in one example: the body of ``prefopt check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
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
          ``answer``, the lengths ``p5``, ``p50``, ``p95`` (which that share of the rows does not
          exceed) and ``max``;
        - ``chosen_longer``: the share of pairs whose chosen answer has more tokens (pairs only;
          without a length bias it is about 0.5);
        - ``duplicates``: rows with the tokens of an earlier row elsewhere; the copies that a
          mixture's weight makes are not counted;
        - ``example``: ``where``, and for each answer a list of {"text", "loss"}: the text that the
          model reads, special tokens included, and whether it bears loss; ``prompt`` where there
          are no answers.
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
    values = np.percentile(column.lengths, (5, 50, 95, 100), method="inverted_cdf")
    return dict(zip(("p5", "p50", "p95", "max"), map(int, values), strict=True))


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
    prompt = _decode(tokenizer, item["prompt_ids"])
    example: dict[str, Any] = {"where": item["where"]}
    if not answers:
        example["prompt"] = [{"text": prompt, "loss": False}]
    for name in answers:
        # Decoded together: SentencePiece-like tokenizers drop the space before a lone answer.
        whole = _decode(tokenizer, item["prompt_ids"] + item[f"{name}_ids"])
        example[name] = [
            {"text": prompt, "loss": False},
            {"text": whole[len(prompt) :], "loss": True},
        ]
    return example


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
