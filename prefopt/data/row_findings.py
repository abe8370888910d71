"""Rows under the eyes of ``prefopt check``: every bad row, and what is odd about good ones."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prefopt.data.findings import Findings
from prefopt.data.rows import Completion, Demonstration, PreferencePair, Prompt, prompt_text
from prefopt.data.sources import LocatedRow, Row
from prefopt.data.text_findings import TextChecks, repeats, role_prefix
from prefopt.errors import DataError

Parser = Callable[[Row, str], list[Any]]

# Columns that would matter if they were read, and hold something.
_MEANINGFUL = (
    "tools", "functions", "system", "system_prompt", "history", "input", "context",
    "images", "image", "videos", "audio", "reasoning", "thinking",
)  # fmt: skip
_FINISH = ("finish_reason", "finish_reasons", "stop_reason")
_FINISH_COLUMNS = (*_FINISH, *(f"{side}_{name}" for side in ("chosen", "rejected")
                               for name in _FINISH))  # fmt: skip
_CUT = {"length", "max_tokens", "max_length", "truncated"}
# Columns with a score of each answer, as data sets name them.
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"), ("reward_chosen", "reward_rejected"),
)  # fmt: skip
_CONSTANT = 10  # labelled rows from which a constant label says something
SENTENCE_ENDS = frozenset(".!?\u2026\"'\u201d\u2019)]}>*_`\xbb\u3002\uff01\uff1f;:|~$%-=/\\")


@dataclass
class Survey:
    """What a pass over the rows of one part leaves behind, beside its findings.

    Attributes:
        items: The good rows, parsed: what training would read.
        invalid: Bad rows by problem.
        rows: Rows looked at, copies of a mixture not counted.
        labels: Signs of the labels by name: p_chosen - 1/2, margin, differences of scores.
        answers: Characters of each answer, of equal ones once.
        finished: Whether it ends like a sentence.
        places: Its row.
        seen: Hashes of the answers.
    """

    items: list[Any] = field(default_factory=list)
    invalid: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    labels: dict[str, array[float]] = field(default_factory=dict)
    answers: array[int] = field(default_factory=lambda: array("q"))
    finished: bytearray = field(default_factory=bytearray)
    places: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


def survey_rows(
    located: Iterator[LocatedRow],
    parse: Parser,
    findings: Findings,
    checks: TextChecks,
    *,
    invalid: Literal["error", "drop"],
) -> Survey:
    """Looks at every row of one part of the data; a bad one stops nothing.

    Args:
        located: (where, row), as `prefopt.data.sources.read_rows` yields them. An error of theirs
            is a finding, and the rows before it count.
        parse: Makes items of a row; raises DataError.
        findings: Where problems go.
        checks: Looks at texts.
        invalid: What training does with bad rows: "drop" makes them warnings.
    """
    survey = Survey()
    severity: Literal["error", "warning"] = "error" if invalid == "error" else "warning"
    seen: dict[bytes, str] = {}
    last, usable = "", False
    for where, row in _readable(located, findings):
        copy, last = where == last, where
        try:
            items = parse(row, where)
        except DataError as error:
            kind, _, detail = error.problem.partition(": ")
            survey.invalid[kind] = survey.invalid.get(kind, 0) + 1
            findings.add(kind, f"field {error.field!r}: {detail}", where, severity=severity)
            continue
        if not copy:
            survey.rows += 1
            _look_at_columns(row, where, findings)
            _look_at_labels(row, where, survey, findings)
            usable = _look_at_items(items, where, findings, checks, survey)
            for item in items:
                _look_for_copies(item, where, seen, findings)
        if usable:
            survey.items += items
    _conclude_labels(survey, findings)
    _conclude_lengths(survey, findings)
    return survey


def prompt_key(prompt: Prompt) -> bytes:
    """Equal for prompts that read alike: case, spaces and the form they are in do not count."""
    return _digest(" ".join(prompt_text(prompt).casefold().split()))


def answers_of(item: Any) -> list[str]:
    """The texts of the answers of a parsed row; none of a prompt."""
    if isinstance(item, PreferencePair):
        return [_text(item.chosen), _text(item.rejected)]
    return [_text(item.completion)] if isinstance(item, Demonstration) else []


def _readable(located: Iterator[LocatedRow], findings: Findings) -> Iterator[LocatedRow]:
    with findings.of("source"):
        yield from located


# --- one row -------------------------------------------------------------------------------------


def _look_at_columns(row: Row, where: str, findings: Findings) -> None:
    for name in _MEANINGFUL:
        if row.get(name):
            findings.add("column not read", f"the column {name!r} is not read", where)
    if any(_cut(row.get(name)) for name in _FINISH_COLUMNS) or row.get("finished") is False:
        findings.add("truncated", "the row says that an answer ended at a limit", where)
    for column in ("prompt", "messages", "chosen", "rejected", "completion"):
        turns = row.get(column)
        for turn in turns if isinstance(turns, list) else ():
            if not isinstance(turn, dict):  # of a column that this algorithm does not read
                break
            lost = sorted(key for key in turn if key not in ("role", "content") and turn[key])
            for key in lost:
                if _cut(turn[key]) and key in _FINISH:
                    findings.add("truncated", f"{column}: a message ended at a limit", where)
                else:
                    findings.add("field not read", f"{column}: a message's {key!r}", where)


def _cut(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(v, str) and v.lower() in _CUT for v in values)


def _look_at_labels(row: Row, where: str, survey: Survey, findings: Findings) -> None:
    signed = {name: row[name] - middle for name, middle in (("p_chosen", 0.5), ("margin", 0.0))
              if _is_number(row.get(name))}  # fmt: skip
    for better, worse in SCORES:
        if _is_number(row.get(better)) and _is_number(row.get(worse)):
            signed[f"{better} - {worse}"] = row[better] - row[worse]
    for name, value in signed.items():
        survey.labels.setdefault(name, array("d")).append(value)
        if value < 0:
            findings.add("label against the pair", f"{name} says that rejected is better", where)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < sys.float_info.max  # an int may be larger; NaN is not smaller


def _look_at_items(
    items: list[Any], where: str, findings: Findings, checks: TextChecks, survey: Survey
) -> bool:
    """Looks at the texts of a row; False where training could not tokenise it."""
    if not items:
        return True
    prompt = items[-1].prompt  # of several answers in one conversation the longest
    answers = [answer for item in items for answer in answers_of(item)]
    turns = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    usable = True
    for text in (*turns, *answers):
        for kind, found in checks.problems(text):
            usable &= kind != "half a character"
            findings.add(kind, found, where)
    told = role_prefix(prompt) if isinstance(prompt, str) else None
    for text in answers:
        told = told or role_prefix(text)
        if (seen := hash(text)) in survey.seen:
            continue
        survey.seen.add(seen)
        survey.places.append(where)
        survey.answers.append(len(text))
        survey.finished.append(text.rstrip()[-1] in SENTENCE_ENDS)
    if told:
        findings.add("role prefix", f"{told!r} stands in the text", where)
    if any(repeats(turns[-1], answer) for answer in answers):
        findings.add("prompt repeated", f"an answer begins with {turns[-1].strip()[:60]!r}", where)
    return usable


def _look_for_copies(item: Any, where: str, seen: dict[bytes, str], findings: Findings) -> None:
    """Compares a row with those before it; a prompt alone may recur."""
    answers = answers_of(item)
    if not answers:
        return
    if len(answers) == 2 and answers[0].split() == answers[1].split():
        findings.add("differ in spaces only", repr(answers[0][:80]), where)
    prompt = prompt_text(item.prompt)
    first = seen.setdefault(_digest(prompt, *answers), where)
    if first != where:
        findings.add("duplicate", f"the same as {first}", where)
    elif len(answers) == 2 and (opposite := seen.get(_digest(prompt, *answers[::-1]))):
        findings.add("contradictory", f"{opposite} has chosen and rejected the other way", where)


def _digest(*texts: str) -> bytes:
    whole = "\0".join(f"{len(text)} {text}" for text in texts)
    return blake2b(whole.encode(errors="surrogatepass"), digest_size=16).digest()


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


# --- all rows ------------------------------------------------------------------------------------


def _conclude_labels(survey: Survey, findings: Findings) -> None:
    for name, values in survey.labels.items():
        against = sum(value < 0 for value in values)
        if 2 * against > len(values):
            found = f"by {name}, rejected is better in {against:,} of {len(values):,} rows"
            findings.add("columns reversed", found)
            continue
        usual = name == "p_chosen" and values[0] == 0.5  # 1, as if the column were left out
        if len(values) >= _CONSTANT and not usual and min(values) == max(values):
            value = values[0] + (0.5 if name == "p_chosen" else 0)
            found = f"{name} is {value:g} in all of {len(values):,} rows"
            findings.add("constant label", found)


def _conclude_lengths(survey: Survey, findings: Findings) -> None:
    lengths = np.asarray(survey.answers, dtype=np.int64)
    unfinished = ~np.frombuffer(bytes(survey.finished), dtype=bool)
    for i in pile_of_cut_answers(lengths, unfinished, shortest=64):
        text = f"answers of exactly {lengths[i]:,} characters end in mid-sentence"
        findings.add("cut at one length", text, survey.places[i])


def pile_of_cut_answers(
    lengths: NDArray[np.int64], unfinished: NDArray[np.bool_], *, shortest: int
) -> list[int]:
    """The answers that were cut at one and the same length, if there are any.

    Answers end in mid-sentence at any length (code, titles, lists), so what tells a limit is a
    pile: at one length at least 5 of them, 9 in 10 of all answers of that length, and 20 times as
    many as at one of the 20 lengths around it on average.

    Args:
        lengths: Of all answers, int [n].
        unfinished: Whether each ends in mid-sentence, bool [n].
        shortest: Length below which answers of equal length are nothing odd.

    Returns:
        Their indices.
    """
    if not len(lengths):
        return []
    cut = np.bincount(lengths[unfinished], minlength=int(lengths.max()) + 11)
    every = np.bincount(lengths, minlength=len(cut))
    sums = np.concatenate([[0], np.cumsum(cut)])
    places = np.arange(len(cut))
    low, high = np.maximum(places - 10, 0), np.minimum(places + 11, len(cut))
    around = (sums[high] - sums[low] - cut) / 20
    piles = (cut >= 5) & (cut >= 0.9 * every) & (cut >= 20 * around) & (places >= shortest)
    if not piles.any():
        return []
    length = np.argmax(np.where(piles, cut, 0))
    return [int(i) for i in np.flatnonzero(unfinished & (lengths == length))]
