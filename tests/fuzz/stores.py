"""What rounds keep on disk: it comes back as it was, and anything else there is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

from fuzz.pairing import chances, finite
from fuzz.target import (
    DEEP,
    JSON_PIECES,
    Target,
    attempt,
    edited,
    file_of,
    json_lines,
    plain,
    scratch,
)
from prefopt.errors import PrefoptError
from prefopt.rollout.engine import Completion
from prefopt.rounds import store
from prefopt.rounds.judging import Judgement
from prefopt.rounds.storage import read_appended

words = st.text(st.characters(codec="utf-8"), max_size=12)
token = st.integers(0, 2**31 - 1)
completions = st.builds(
    Completion,
    token_ids=st.lists(token, max_size=5),
    text=words,
    finish_reason=st.sampled_from(["stop", "length"]),
    log_prob=st.none() | st.floats(allow_nan=False),
)
samples = st.builds(store.Sample, completions, st.floats(0, 2), st.integers(0, 5))
rollouts = st.dictionaries(token, st.lists(samples, min_size=1, max_size=3), max_size=3)
matches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), chances), max_size=4)
judgements = st.dictionaries(
    token, st.builds(Judgement, st.lists(finite, max_size=4), matches), max_size=3
)


def keep_rollouts(written: dict[int, list[store.Sample]]) -> None:
    """Samples come back as they were written."""
    path = scratch() / "rollouts.parquet"
    store.write_rollouts(path, written)
    assert store.read_rollouts(path) == written


def keep_judgements(written: dict[int, Judgement]) -> None:
    """Judgements come back to the last bit."""
    path = scratch() / "judgements.jsonl"
    store.write_judgements(path, written)
    found = store.read_judgements(path)
    assert found == written
    assert repr(found) == repr(written)  # -0.0 is 0.0


ROLLOUTS = Target(rollouts, keep_rollouts)
JUDGEMENTS = Target(judgements, keep_judgements)

judgement_lines = st.lists(
    st.fixed_dictionaries(
        {"position": token | plain, "scores": st.lists(finite) | plain, "matches": matches | plain}
    )
    | plain,
    max_size=3,
).map(json_lines)


def read_any(content: bytes) -> None:
    """Files of a round with any bytes are read or refused with their name."""
    for read in (store.read_lines, store.read_judgements, store.read_rollouts):
        path = file_of("stored.bin", content)
        found = attempt(read, path)
        if isinstance(found, PrefoptError):
            assert str(path) in str(found)
    path = file_of("appended.jsonl", content)
    rows = attempt(read_appended, path)
    kept = path.read_bytes()
    lines = kept.split(b"\n")
    assert lines.pop() == b""
    of_file = iter(content.split(b"\n")[:-1])
    assert all(line in of_file for line in lines), "lines are taken out, in order, never changed"
    assert len(rows) == len(lines)
    assert json.dumps(read_appended(path)) == json.dumps(rows)


STORED_FILES = Target(
    edited(judgement_lines, JSON_PIECES) | st.binary(max_size=20),
    read_any,
    {
        "null": b"null\n",
        "an empty line": b"\n",
        "brackets": DEEP + b"\n",
        "a judgement without a position": b'{"scores": [], "matches": []}\n',
        "matches of one number": b'{"position": 0, "scores": [], "matches": [1]}\n',
        "matches of two": b'{"position": 0, "scores": [], "matches": [[1, 2]]}\n',
    },
    raw=True,
)


def append(case: tuple[list[Any], float]) -> None:
    """Of a file of lines that was cut anywhere, the whole lines come back."""
    rows, share = case
    lines = json_lines(rows)
    content = lines[: math.floor(share * len(lines))]
    path = file_of("cut.jsonl", content)
    whole = content.count(b"\n")
    assert json.dumps(read_appended(path)) == json.dumps(rows[:whole])
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


CUT_FILES = Target(
    st.tuples(st.lists(st.dictionaries(words, plain, max_size=3)), st.floats(0, 1)), append
)
