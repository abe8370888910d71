"""Annotations are read strictly, difficulties found, and leaderboards written as alpaca_eval's."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.errors import DataError, PrefoptError
from prefopt.eval.annotations import (
    Annotations,
    difficulty_by_instruction,
    difficulty_by_position,
    read_annotations,
    read_difficulty,
)
from prefopt.eval.leaderboard import (
    COLUMNS,
    leaderboard,
    ranked,
    read_leaderboard,
    write_leaderboard,
)
from prefopt.eval.length_control import length_controlled_win_rate

DATA = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval2"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data/alpaca_eval2")


def row(**change):
    fields = {
        "instruction": "Say hello.",
        "output_1": "Hello there.",
        "generator_1": "base",
        "output_2": "Hé",
        "generator_2": "mine",
        "dataset": "d",
        "annotator": "judge",
        "preference": 1.25,
    }
    return {key: value for key, value in (fields | change).items() if value != "absent"}


def write(tmp_path, content):
    path = tmp_path / "annotations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def judgements(model, preferences, length=10, n=None):
    values = np.asarray(preferences, dtype=float)
    n = len(values)
    lengths = np.full(n, float(length)) + np.arange(n) % 3
    return Annotations(
        model, "base", [f"q{i}" for i in range(n)], values, lengths, np.full(n, 10.0)
    )


def test_annotations_are_read_with_lengths_in_characters(tmp_path):
    rows = [row(), row(instruction="Again.", preference=None), row(preference=float("nan"))]
    result = read_annotations(write(tmp_path, rows))
    assert (result.model, result.baseline) == ("mine", "base")
    assert result.instructions == ["Say hello.", "Again.", "Say hello."]
    assert result.preferences == pytest.approx([1.25, math.nan, math.nan], nan_ok=True)
    assert result.model_lengths.tolist() == [2, 2, 2]
    assert result.baseline_lengths.tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"preference": "absent"}, "preference", "no such field"),
        ({"preference": "model"}, "preference", "found 'model'"),
        ({"preference": True}, "preference", "found True"),
        ({"output_1": "absent"}, "output_1", "found None, expected a string"),
        ({"output_2": 3}, "output_2", "found 3"),
        ({"generator_2": "other"}, "generator_2", "'other' against 'base', expected 'mine'"),
        ({"generator_1": "other"}, "generator_2", "'mine' against 'other'"),
    ],
)
def test_bad_annotations_are_named_by_row(tmp_path, change, field, message):
    path = write(tmp_path, [row(), row(**change)])
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(path)
    assert (caught.value.where, caught.value.field) == (f"{path}:2", field)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        ({"a": 1}, "holds a dict"),
        ([], "no rows"),
        (["x"], "annotations.json:1.*expected an object"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path, content, message):
    with pytest.raises(PrefoptError, match=message):
        read_annotations(write(tmp_path, content))
    with pytest.raises(PrefoptError, match="cannot be read"):
        read_annotations(tmp_path / "absent.json")


def test_difficulty_by_instruction_and_by_position():
    reference = ["a", "b", "c", "d"]
    difficulty = [0.0, 1.0, 2.0, 3.0]
    assert difficulty_by_instruction(difficulty, reference, ["d", "a"]).tolist() == [3, 0]
    # A file without "b": every row after it is shifted.
    assert difficulty_by_instruction(difficulty, reference, ["a", "c", "d"]).tolist() == [0, 2, 3]
    assert difficulty_by_position(difficulty, 3).tolist() == [0, 1, 2]
    whole = difficulty_by_instruction(difficulty, reference, reference)
    assert (difficulty_by_position(difficulty, 4) == whole).all()
    with pytest.raises(PrefoptError, match=r"1 of 2 instructions.*'x'"):
        difficulty_by_instruction(difficulty, reference, ["a", "x"])
    with pytest.raises(PrefoptError, match="4 difficulties for 3"):
        difficulty_by_instruction(difficulty, reference[:3], ["a"])
    with pytest.raises(PrefoptError, match="5 rows for 4"):
        difficulty_by_position(difficulty, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,other\n0,1\n", "field 'instruction_difficulty'"),
        ("index,instruction_difficulty\n", "no rows"),
        ("index,instruction_difficulty\n0,1\n2,1\n", ":2: field 'index': found '2', expected 1"),
        ("instruction_difficulty\n1\nx\n", ":2: .*found 'x'"),
        ("instruction_difficulty\nnan\n", "found 'nan'"),
    ],
)
def test_bad_difficulties_are_refused(tmp_path, text, message):
    path = tmp_path / "difficulty.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_difficulty(path)


def test_difficulties_are_read(tmp_path):
    path = tmp_path / "difficulty.csv"
    path.write_text("index,instruction_difficulty\n0,0.5\n1,-2\n")
    assert read_difficulty(path).tolist() == [0.5, -2.0]
    path.write_text("instruction_difficulty\n0.5\n-2\n")
    assert read_difficulty(path).tolist() == [0.5, -2.0]


def test_leaderboard_rates_each_model_and_ranks():
    rng = np.random.default_rng(0)
    models = {
        "weak": judgements("weak", 1 + 0.5 * rng.random(30), 8),
        "strong": judgements("strong", 1.5 + 0.5 * rng.random(30), 21),
        "base": judgements("base", [1.5] * 30, 10),
    }
    models["base"].model_lengths[:] = 10
    difficulty = {name: rng.normal(size=30) for name in models}
    rows = leaderboard(models, instruction_difficulty=difficulty, C=10, mode="verified")
    assert [r.model for r in rows] == ["strong", "base", "weak"]
    strong = models["strong"]
    expected = length_controlled_win_rate(
        strong.preferences,
        strong.model_lengths,
        strong.baseline_lengths,
        instruction_difficulty=difficulty["strong"],
        C=10,
    )
    first = rows[0]
    assert (first.win_rate, first.length_controlled_winrate) == (
        expected.win_rate,
        expected.lc_win_rate,
    )
    assert (first.n_wins, first.n_wins_base, first.n_draws, first.n_total) == (30, 0, 0, 30)
    assert (first.avg_length, first.mode) == (22, "verified")
    assert (rows[1].win_rate, rows[1].length_controlled_winrate) == (50, 50)


def test_leaderboard_says_which_model_cannot_be_rated():
    models = {"good": judgements("good", [1.2] * 9), "bad": judgements("bad", [0.2] * 9)}
    with pytest.raises(PrefoptError, match=r"^bad: the preferences lie in"):
        leaderboard(models, C=1)
    with pytest.raises(PrefoptError, match="no instruction_difficulty for 'bad'"):
        leaderboard(models, instruction_difficulty={"good": [0.0] * 9}, C=1)


def test_leaderboard_file_round_trips(tmp_path):
    rng = np.random.default_rng(1)
    models = {
        'a "quoted", name': judgements("a", 1 + rng.random(20)),
        "one row": judgements("b", [1.7]),
        "c": judgements("c", 1 + rng.random(20)),
    }
    rows = leaderboard(models, C=10)
    assert next(r for r in rows if r.model == "one row").standard_error is None
    path = tmp_path / "leaderboard.csv"
    write_leaderboard(path, reversed(rows))
    assert read_leaderboard(path) == rows == ranked(reversed(rows))
    header = path.read_text().splitlines()[0]
    assert header == "," + ",".join(COLUMNS[1:])


def test_a_model_of_a_leaderboard_is_no_formula(tmp_path):
    path = tmp_path / "leaderboard.csv"
    write_leaderboard(path, leaderboard({"=HYPERLINK(1)": judgements("a", [1.2, 1.9])}, C=1))
    assert path.read_text().splitlines()[1].startswith("'=HYPERLINK(1),")


def test_rows_without_length_control_come_last(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(
        ",win_rate,standard_error,n_wins,n_wins_base,n_draws,n_total,discrete_win_rate,mode,"
        "avg_length,extra\n"
        "old,90.0,1.0,9,1,0,10,90.0,minimal,500,7\n"
    )
    (old,) = read_leaderboard(path)
    assert old.length_controlled_winrate is None
    new = leaderboard({"new": judgements("new", [1.2] * 9 + [1.9])}, C=1)
    assert [r.model for r in ranked([old, *new])] == ["new", "old"]
    write_leaderboard(path, [old, *new])
    assert read_leaderboard(path)[1] == old


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "the first heading"),
        ("model,win_rate\nx,1\n", "field 'n_wins': no such column"),
        (",".join(["", *COLUMNS[1:]]) + "\nx,?,1,1,1,1,1,1,m,1,1,1\n", ":1: field 'win_rate'.*'?'"),
        (",".join(["", *COLUMNS[1:]]) + "\nx,1,1,,1,1,1,1,m,1,1,1\n", "'n_wins': found ''"),
    ],
)
def test_bad_leaderboards_are_refused(tmp_path, text, message):
    path = tmp_path / "leaderboard.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_leaderboard(path)


@needs_data
def test_published_leaderboard_from_judgements():
    difficulty = read_difficulty(DATA / "common" / "instruction_difficulty.csv")
    published = {r.model: r for r in read_leaderboard(DATA / "public" / "leaderboard.csv")}
    models = {}
    for name in published:
        lines = (DATA / "public" / f"{name}.jsonl").read_text().splitlines()
        columns = {
            key: np.array([json.loads(line)[key] for line in lines], dtype=float)
            for key in ("preference", "len_model", "len_baseline")
        }
        models[name] = Annotations(name, "gpt4_1106_preview", [""] * len(lines), *columns.values())
    rows = leaderboard(
        models,
        instruction_difficulty=dict.fromkeys(models, difficulty),
        gamed=DATA / "common" / "gamed_baselines.csv",
    )
    assert [r.model for r in rows] == [r.model for r in ranked(published.values())]
    for r in rows:
        expected = published[r.model]
        assert (r.n_wins, r.n_wins_base, r.n_draws, r.n_total, r.avg_length) == (
            expected.n_wins,
            expected.n_wins_base,
            expected.n_draws,
            expected.n_total,
            expected.avg_length,
        )
        assert r.win_rate == pytest.approx(expected.win_rate, abs=1e-6)
        assert r.length_controlled_winrate == pytest.approx(
            expected.length_controlled_winrate, abs=0.2
        )


@needs_data
def test_all_published_rows_are_read():
    path = DATA / "common" / "published_all_models.csv"
    with path.open() as file:
        assert len(read_leaderboard(path)) == len(list(csv.reader(file))) - 1


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"instruction": "a", "output_1": "b", "output_2": "cc", "preference": 1.5}
    names = {"generator_1": "base", "generator_2": "[/red] fish"}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([row | names | {"instruction": str(n)} for n in range(6)]))
    out = tmp_path / "leaderboard.csv"
    assert main(["eval", "leaderboard", str(path), "--out", str(out)]) == 0
    assert "[/red] fish" in capsys.readouterr().out
