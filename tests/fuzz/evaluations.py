"""What evaluations read: answers, annotations, questions, difficulties, and run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from shutil import rmtree
from typing import Any

from hypothesis import strategies as st

from fuzz.rows import cells
from fuzz.target import (
    DEEP,
    HUGE,
    JSON_PIECES,
    Target,
    attempt,
    edited,
    file_of,
    json_lines,
    plain,
    scratch,
)
from fuzz.target import texts as any_texts
from prefopt.errors import PrefoptError
from prefopt.eval import annotations, answers, questions
from prefopt.eval.report import write_report

texts = st.sampled_from(["a", "b"]) | any_texts


def _rows(columns: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[list[Any]]:
    """Rows with most of the columns, now and then with something else in one of them."""
    row = st.fixed_dictionaries({}, optional={k: v | v | v | plain for k, v in columns.items()})
    whole = st.fixed_dictionaries(columns)
    return st.lists(whole | row | plain, min_size=1, max_size=3)


def _files(rows: st.SearchStrategy[list[Any]]) -> st.SearchStrategy[bytes]:
    as_list = rows.map(json.dumps).map(str.encode)
    return rows.map(json_lines) | as_list | edited(as_list, JSON_PIECES)


def _reader(name: str, *reads: Callable[[Any], Any]) -> Callable[[bytes], None]:
    def check(content: bytes) -> None:
        """A file of any content is read, or refused with its name."""
        path = file_of(name, content)
        for read in reads:
            found = attempt(read, path)
            if isinstance(found, PrefoptError):
                assert str(path) in str(found)

    return check


ANSWERS = Target(
    _files(_rows({"prompt": cells, "sample": st.integers(0, 2), "completion": texts}))
    | _files(_rows({"instruction": texts, "output": texts, "generator": texts})),
    _reader("answers.json", answers.read_answers, lambda path: answers.read_prompts(str(path))),
    raw=True,
)
ANNOTATIONS = Target(
    _files(
        _rows(
            dict.fromkeys(annotations.TEXTS, texts)
            | {
                "preference": st.floats(1, 2) | st.none() | st.sampled_from(HUGE),
                "annotator": texts,
            }
        )
    ),
    _reader("annotations.json", annotations.read_annotations),
    {
        "a preference of 400 digits": json.dumps(
            [dict.fromkeys(annotations.TEXTS, "a") | {"preference": 10**400}]
        ).encode(),
        "brackets": DEEP,
    },
    raw=True,
)
_table = st.lists(st.tuples(st.integers(0, 3), st.floats() | texts), max_size=4).map(
    lambda rows: "".join(
        ["index,instruction_difficulty\n", *(f"{index},{value}\n" for index, value in rows)]
    ).encode(errors="replace")
)
DIFFICULTIES = Target(
    edited(_table, [b'"', b",", b"\n", b"\r", b"\x00", b"\xff", b"9" * 140_000]),
    _reader("difficulty.csv", annotations.read_difficulty),
    {"a field of 140,000 characters": b"9" * 140_000},
    raw=True,
)
_asked = [questions.Question(1, "", ["a"]), questions.Question("b", "x", ["b"])]
_turns = st.lists(texts | st.fixed_dictionaries({"content": texts}), max_size=2)
_choices = st.lists(st.fixed_dictionaries({"turns": _turns | plain}) | plain, max_size=2)
QUESTIONS = Target(
    _files(_rows({"uid": texts | st.integers(0, 3), "prompt": texts, "category": texts}))
    | _files(_rows({"question_id": st.integers(0, 3), "turns": _turns}))
    | _files(_rows({"question_id": st.integers(0, 3), "model_id": texts, "choices": _choices}))
    | _files(_rows({"uid": st.just("b") | texts, "model": texts, "messages": cells})),
    _reader(
        "questions.json",
        lambda path: questions.read_questions(path, 1),
        lambda path: questions.read_player(path, _asked, 1),
    ),
    raw=True,
)

# --- run folders ---------------------------------------------------------------------------------

numbers = st.integers(0, 9) | st.floats(0, 100) | st.floats() | plain
metrics = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | plain},
    optional=dict.fromkeys(("loss", "kl", "rewards/margins", "epoch", "x\ny", ""), numbers),
)
results = st.fixed_dictionaries(
    {"win_rate": numbers},
    optional={
        "win_rate_ci": st.lists(numbers, max_size=3) | plain,
        "judge": plain,
        "step": numbers,
        "after": plain,
        "unit": plain,
        "kl": numbers,
        "mean_length": numbers,
        "baseline_mean_length": numbers,
        "prompts": plain,
        "length_controlled": st.fixed_dictionaries({"win_rate": numbers}) | plain,
    },
)
answered = st.fixed_dictionaries(
    {}, optional={"prompt": cells, "sample": plain, "completion": texts}
)
preferred = st.fixed_dictionaries({"prompt": st.integers(0, 2) | plain, "preference": numbers})
samples = st.fixed_dictionaries({"answers": st.dictionaries(texts, texts | plain) | plain})
summaries = st.fixed_dictionaries(
    {},
    optional={
        "algorithms": st.dictionaries(texts, results | plain, max_size=2) | plain,
        "evaluations": st.lists(results | plain, max_size=2) | plain,
        "judges": plain,
        "judge": plain,
        **dict.fromkeys(("seconds", "steps", "stopped", "algorithm", "gold"), plain),
    },
)


def _lines(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    whole = st.lists(rows, max_size=4).map(json_lines)
    return whole | whole | edited(whole, JSON_PIECES)


def _object(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    whole = rows.map(json.dumps).map(str.encode)
    return whole | whole | edited(whole, JSON_PIECES)


folders = st.fixed_dictionaries(
    {},
    optional={
        "metrics.jsonl": _lines(metrics),
        "recipe.yaml": st.binary(max_size=9),
        "environment.json": st.binary(max_size=9)
        | _object(st.fixed_dictionaries({"determinism": plain})),
        "summary.json": _object(summaries),
        "samples.jsonl": _lines(samples),
        "evaluations/baseline.jsonl": _lines(answered),
        "evaluations/0001/result.json": _object(results),
        "evaluations/0001/answers.jsonl": _lines(answered),
        "evaluations/0001/preferences.jsonl": _lines(preferred),
        "other/metrics.jsonl": _lines(metrics),
        "other/evaluations/baseline.jsonl": _lines(answered),
        "other/evaluations/0001/result.json": _object(results),
    },
)


def report(files: dict[str, bytes]) -> None:
    """A run folder with anything in its files has a report, or is refused with its name."""
    folder = scratch() / "run"
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        file_of(f"run/{name}", content)
    page = attempt(write_report, folder)
    if isinstance(page, PrefoptError):
        assert str(folder) in str(page)
    else:
        assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


REPORTS = Target(folders, report, {"brackets": {"environment.json": DEEP}})
