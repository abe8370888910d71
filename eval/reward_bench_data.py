"""The rows of RewardBench 1, its prior sets and RewardBench 2, from files or the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path

from prefopt.data.rows import Prompt, parse_pair, parse_prompt
from prefopt.data.sources import LocatedRow, Row, read_rows
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.reward_bench_scores import PRIOR_SETS, PUBLISHED_ROWS, TIES

SPLITS = {1: "filtered", 2: "test"}  # what the data sets call the rows that are scored


@dataclass(frozen=True)
class Item:
    """One row.

    Attributes:
        id: Its id in the data set.
        subset: Such as "mt-bench-easy".
        prompt: Messages that end with the user's.
        answers: The right answers, then the wrong ones.
        right: Number of right answers.
        where: Its place, ``file:row``.
    """

    id: str
    subset: str
    prompt: Prompt
    answers: list[str]
    right: int
    where: str


def read_items(path: str, version: int, split: str | None = None) -> list[Item]:
    """Reads the data set in its published columns.

    Version 1 has prompt, chosen, rejected (texts), subset and id; prompt may also be messages.
    Version 2 has lists of texts in chosen and rejected, and ids such as "ref:7" in subset Ties.

    Args:
        path: A file, a folder or a Hub id.
        version: 1 or 2.
        split: Of a folder or on the Hub; default: the published one, "filtered" or "test".

    Raises:
        PrefoptError: It cannot be read, a row has other columns, or a subset is unknown.
    """
    default = "train" if Path(path).is_file() else SPLITS[version]
    parse = _parse_pair if version == 1 else _parse_choice
    items = [parse(row, where) for where, row in read_rows(path, split=split or default)]
    _refuse_other_subsets(path, items, tuple(PUBLISHED_ROWS[version]))
    pair_ties(items)
    return items


def read_prior_sets(path: str) -> list[Item]:
    """Reads the four prior sets that RewardBench 1 once counted.

    Args:
        path: A file with the column subset, or a folder or Hub id with one split a set, as
            ``allenai/preference-test-sets`` has them; its other splits are not read.

    Raises:
        PrefoptError: It cannot be read, or a set is missing or unknown.
    """
    rows: Iterable[LocatedRow] = (
        read_rows(path)
        if Path(path).is_file()
        else (
            (where, row | {"subset": name})
            for name in PRIOR_SETS
            for where, row in read_rows(path, split=name)
        )
    )
    items = [_parse_pair(row, where) for where, row in rows]
    _refuse_other_subsets(path, items, PRIOR_SETS)
    missing = [name for name in PRIOR_SETS if name not in {item.subset for item in items}]
    if missing:
        raise PrefoptError(
            f"{path}: found no rows of {', '.join(missing)}, expected all prior sets"
        )
    return items


def pair_ties(items: Sequence[Item]) -> list[tuple[int, int]]:
    """The positions of each question of subset Ties: with one right answer, and with several.

    Raises:
        PrefoptError: An id is not "ref:NUMBER" or "tied:NUMBER", is there twice or has no
            counterpart.
    """
    places: dict[str, dict[str, int]] = {"ref": {}, "tied": {}}
    for index, item in enumerate(items):
        if item.subset == TIES:
            kind, _, number = item.id.partition(":")
            if kind not in places or not number:
                expected = "expected ref:NUMBER or tied:NUMBER in subset Ties"
                raise DataError(item.where, "id", f"found {item.id!r}, {expected}")
            if number in places[kind]:
                raise DataError(item.where, "id", f"found {item.id} twice, expected it once")
            places[kind][number] = index
    ref, tied = places["ref"], places["tied"]
    if alone := sorted(ref.keys() ^ tied.keys()):
        index = (ref | tied)[alone[0]]
        problem = f"{items[index].id} has no counterpart, expected one ref and one tied row each"
        raise DataError(items[index].where, "id", f"{problem} ({len(alone)} have none)")
    return [(ref[number], tied[number]) for number in ref]


def items_hash(items: Iterable[Item]) -> str:
    """A hash (sha256, hex) over all that is scored, whatever its order and place."""
    lines = sorted(json.dumps(astuple(item)[:-1], sort_keys=True) for item in items)
    return sha256("\n".join(lines).encode()).hexdigest()


def _parse_pair(row: Row, where: str) -> Item:
    """A row of version 1. Texts are taken as they are, also empty or equal ones."""
    prompt, chosen, rejected = (_column(row, where, c) for c in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, list) and chosen and isinstance(chosen[0], str):
        raise DataError(where, "chosen", "found a list of texts, which --version 2 reads")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _item(row, where, _prompt(prompt, where), [chosen], [rejected])
    pair = parse_pair(row, where)
    answers = [[_text_of(answer)] for answer in (pair.chosen, pair.rejected)]
    return _item(row, where, pair.prompt, *answers)


def _parse_choice(row: Row, where: str) -> Item:
    """A row of version 2."""
    prompt = _prompt(_column(row, where, "prompt"), where)
    chosen, rejected = _texts(row, where, "chosen"), _texts(row, where, "rejected")
    item = _item(row, where, prompt, chosen, rejected)
    if item.subset != TIES and len(chosen) != 1:
        problem = f"found {len(chosen)} answers, expected one outside of subset Ties"
        raise DataError(where, "chosen", problem)
    return item


def _item(row: Row, where: str, prompt: Prompt, right: list[str], wrong: list[str]) -> Item:
    subset = _column(row, where, "subset")
    if not isinstance(subset, str):
        raise DataError(where, "subset", f"found {subset!r}, expected text")
    return Item(str(row.get("id", "")), subset, prompt, right + wrong, len(right), where)


def _column(row: Row, where: str, name: str) -> object:
    if row.get(name) is None:
        columns = f"missing column: found the columns {', '.join(row) or 'none'}"
        found = "found no value" if name in row else columns
        raise DataError(where, name, f"{found}, expected prompt, chosen, rejected and subset")
    return row[name]


def _prompt(value: object, where: str) -> Prompt:
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    return parse_prompt({"prompt": messages}, where)


def _texts(row: Row, where: str, name: str) -> list[str]:
    value = _column(row, where, name)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    hint = "; --version 1 reads one text" if isinstance(value, str) else ""
    found = f"found {type(value).__name__}, expected a list of one or more texts"
    raise DataError(where, name, found + hint)


def _text_of(answer: str | list[dict[str, str]]) -> str:
    return answer if isinstance(answer, str) else answer[0]["content"]


def _refuse_other_subsets(path: str, items: Sequence[Item], known: Sequence[str]) -> None:
    others = sorted({item.subset for item in items} - set(known))
    if others:
        raise PrefoptError(
            f"{path}: found the subsets {', '.join(others)}, expected some of {', '.join(known)}"
        )
