from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from prefopt.data.sources import Source, read_rows, read_sources
from prefopt.errors import DataError, PrefoptError

ROWS = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict]) -> Path:
    """Writes rows in the format that the suffix names."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = lines(rows) if ".jsonl" in path.name else json.dumps(rows, indent=1)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def one_line(error: pytest.ExceptionInfo[PrefoptError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz", "parquet"])
def test_every_format_gives_the_rows_with_their_places(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"pairs.{suffix}", ROWS)
    assert list(read_rows(path)) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, start=1)]


def test_json_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\r\n\n  \n{"a": "x\u2028y"}', encoding="utf-8")
    assert list(read_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": "x\u2028y"})]


def test_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(lines(ROWS))
    assert [row for _, row in read_rows(path)] == ROWS


def test_folder_is_read_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", ROWS[2:])
    write(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "README.md").write_text("not data")
    assert [row for _, row in read_rows(tmp_path)] == ROWS
    assert next(read_rows(str(tmp_path)))[0] == f"{tmp_path / 'a.jsonl'}:1"


def test_folder_splits_by_file_name(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[1:2])
    write(tmp_path / "test.jsonl", ROWS[2:])
    assert [row for _, row in read_rows(tmp_path)] == ROWS[:2]
    assert [row for _, row in read_rows(tmp_path, split="test")] == ROWS[2:]
    with pytest.raises(PrefoptError, match="no split 'dev'; its files are named test, train"):
        read_rows(tmp_path, split="dev")


def test_held_out_files_are_never_read_as_train(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", ROWS)
    write(tmp_path / "other.jsonl", ROWS)
    with pytest.raises(PrefoptError, match="no split 'train'"):
        read_rows(tmp_path)
    assert len(list(read_rows(tmp_path / "test.jsonl"))) == 4  # named by hand, it is meant
    assert len(list(read_rows(tmp_path / "test.jsonl", split="test"))) == 4


def test_saved_datasets(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([3])}).save_to_disk(
        tmp_path / "two"
    )
    one, two = tmp_path / "one", tmp_path / "two"
    assert list(read_rows(one)) == [(f"{one}:{i}", row) for i, row in enumerate(ROWS, start=1)]
    assert list(read_rows(two, split="test")) == [(f"{two}[test]:1", ROWS[3])]
    with pytest.raises(PrefoptError, match="no split 'dev'; this dataset has test, train"):
        read_rows(two, split="dev")
    with pytest.raises(PrefoptError, match="saved without splits"):
        read_rows(one, split="test")


@pytest.mark.parametrize("name", ["dataset_dict.json", "train/state.json"])
@pytest.mark.parametrize(
    "content", ["{", "[]", "null", "{}", '{"splits": 1, "_data_files": [1]}', "[" * 10_000]
)
def test_damaged_saved_datasets(name: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
    (folder / name).write_text(content)
    with pytest.raises(PrefoptError, match="cannot be read as a saved dataset") as error:
        read_rows(folder)
    one_line(error)


def test_saved_datasets_are_read_as_they_are_whatever_their_format(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.with_format("numpy", columns=list(ROWS[0])[:1]).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read_rows(tmp_path / "saved")] == ROWS


def test_values_of_saved_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    times = pyarrow.array([0, 10**17], pyarrow.timestamp("s"))
    datasets.Dataset(pyarrow.table({"prompt": ["a", "b"], "when": times})).save_to_disk(
        tmp_path / "a"
    )
    rows = read_rows(tmp_path / "a")
    assert next(rows)[0] == f"{tmp_path}/a:1"
    with pytest.raises(PrefoptError, match=r"a:2: found a value that cannot be read") as error:
        next(rows)
    one_line(error)


def test_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(path: str, name: str, *, split: str, revision: str) -> datasets.Dataset:
        asked.append((path, name, split, revision))
        if split == "dev":
            raise ValueError('Unknown split "dev". Should be one of ["test"].\nmore')
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("owner/pairs", split="test", name="en", revision="v1")
    assert next(rows) == ("owner/pairs[test]:1", ROWS[0])
    assert asked == [("owner/pairs", "en", "test", "v1")]
    with pytest.raises(PrefoptError, match=r"owner/pairs: split 'dev'.*Should be one of") as error:
        read_rows("owner/pairs", split="dev")
    one_line(error)


def test_neither_file_nor_hub_mentions_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PrefoptError, match="neither a local file or folder, nor found") as error:
        read_rows("no-such-owner/no-such-name")
    assert "network" in one_line(error)


@pytest.mark.parametrize("path", ["gone.jsonl", "./gone", "/gone/or/not", "a/b/c", "~/gone"])
def test_what_can_only_be_a_file_is_not_looked_up(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(PrefoptError, match=f"^{re.escape(path)}: no such file or folder"):
        read_rows(path)


BROKEN = {
    "bad.jsonl": (b'{"a": 1}\n\n{"a": \n', r"bad\.jsonl: invalid JSON on line 3, column"),
    "object.jsonl": (b'{"a": 1}\n["a"]\n', r"object\.jsonl:2: found a JSON list, expected an obj"),
    "null.jsonl": (b"null\n", r"null\.jsonl:1: found a JSON null"),
    "list.json": (b'[{"a": 1},\n 7]', r"list\.json:2: found a JSON number"),
    "bad.json": (b'[{"a": 1},\n {]', r"bad\.json: invalid JSON on line 2.* or one list"),
    "pretty.json": (b'{\n "a": 1}', r"pretty\.json: invalid JSON on line 1"),
    "empty.jsonl": (b"\n \n", r"empty\.jsonl: no rows"),
    "empty.json": (b"[]", r"empty\.json: no rows"),
    "empty.jsonl.gz": (b"", r"empty\.jsonl\.gz: no rows"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), r"latin\.jsonl:1: not UTF-8"),
    "plain.jsonl.gz": (b'{"a": 1}\n', r"plain\.jsonl\.gz: not a readable gzip file"),
    "bad.parquet": (b"PAR1 but not really", r"bad\.parquet: not a readable Parquet file"),
    "rows.csv": (b"a,b\n1,2\n", r"rows\.csv: unsupported extension '\.csv'; expected \.jsonl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrefoptError, match=message) as error:
        list(read_rows(tmp_path / name))
    one_line(error)


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_truncated_gzip(tmp_path: Path, share: float) -> None:
    rows = [{"prompt": str(i * 7919), "chosen": "a" * (i % 13)} for i in range(5000)]
    data = gzip.compress(lines(rows).encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(data[: int(share * len(data))])
    read: list[dict] = []
    with pytest.raises(PrefoptError, match=r"cut\.jsonl\.gz: the gzip stream ends early") as error:
        read.extend(row for _, row in read_rows(path))
    one_line(error)
    assert 0 < len(read) < len(rows)
    assert read == rows[: len(read)]  # what did arrive is right


def test_damaged_gzip(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(lines(ROWS * 500).encode()))
    data[len(data) // 2] ^= 0xFF
    path = tmp_path / "damaged.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(PrefoptError, match=r"damaged\.jsonl\.gz: "):
        list(read_rows(path))


def test_folder_without_data_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PrefoptError, match="no data file in this folder"):
        read_rows(tmp_path)


def test_a_file_has_no_splits_and_no_revision(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(PrefoptError, match="no split 'test'; a single file has no splits"):
        read_rows(path, split="test")
    with pytest.raises(PrefoptError, match="'name' and 'revision' belong to a Hub dataset"):
        read_rows(path, revision="main")


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[str, str]:
    first = write(tmp_path / "first.jsonl", [{"i": i} for i in range(100)])
    second = write(tmp_path / "second.jsonl", [{"i": i} for i in range(10)])
    return str(first), str(second)


@pytest.mark.parametrize(
    ("weight", "once", "twice"), [(0.5, 50, 0), (1, 100, 0), (1.5, 50, 50), (2, 0, 100)]
)
def test_weight_is_the_number_of_times_a_row_appears(
    two_files: tuple[str, str], weight: float, once: int, twice: int
) -> None:
    counts = Counter(where for where, _ in read_sources([Source(two_files[0], weight)], seed=0))
    times = Counter(counts.values())
    assert (times[1], times[2]) == (once, twice)
    assert counts.total() == 100 * weight


def test_mixture_keeps_places_and_order(two_files: tuple[str, str]) -> None:
    first, second = two_files
    mixture = list(read_sources([Source(first, 0.5), Source(second, 2)], seed=3))
    expected = {f"{path}:{i + 1}": {"i": i} for path in two_files for i in range(100)}
    assert all(expected[where] == row for where, row in mixture)
    assert [where for where, _ in mixture[50:]] == [f"{second}:{1 + i // 2}" for i in range(20)]
    rows = [row["i"] for _, row in mixture[:50]]
    assert rows == sorted(rows)


def test_share_depends_on_the_seed_alone(two_files: tuple[str, str]) -> None:
    def share(seed: int) -> list[str]:
        return [where for where, _ in read_sources([Source(two_files[0], 0.5)], seed=seed)]

    assert share(1) == share(1)
    assert share(1) != share(2)
    halves = read_sources([Source(two_files[0], 0.5), Source(two_files[0], 0.5)], seed=1)
    assert len({where for where, _ in halves}) > 50  # two sources draw different halves


def test_share_is_spread_over_the_file(two_files: tuple[str, str]) -> None:
    counts = Counter(
        row["i"]
        for seed in range(400)
        for _, row in read_sources([Source(two_files[0], 0.25)], seed=seed)
    )
    # 400 draws of 1 in 4: mean 100, standard deviation 8.7, so 5.5 of them on either side
    assert set(counts) == set(range(100))
    assert all(52 < count < 148 for count in counts.values())


def test_weight_too_small_for_a_single_row(two_files: tuple[str, str]) -> None:
    with pytest.raises(PrefoptError, match=r"second\.jsonl: weight 0\.01 of 10 rows gives no row"):
        list(read_sources([Source(two_files[1], 0.01)], seed=0))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_impossible_weight(weight: float) -> None:
    with pytest.raises(PrefoptError, match=r"a\.jsonl: weight is"):
        Source("a.jsonl", weight)


def test_a_cell_of_parquet_that_python_cannot_hold_is_named(tmp_path: Path) -> None:
    days = pyarrow.array([0, 1, 2**31 - 1], pyarrow.date32())  # the last one is after the year 9999
    path = tmp_path / "dates.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "day": days}), path)
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(read_rows(path))
    assert (caught.value.where, caught.value.field) == (f"{path}:3", "day")


def test_numbers_too_long_and_lists_too_deep_are_named_by_line(tmp_path: Path) -> None:
    for line, found in (("9" * 5000, "thousands of digits"), ("[" * 100_000, "nested too deeply")):
        path = tmp_path / "odd.jsonl"
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(PrefoptError, match=rf"odd\.jsonl:2: .*{found}"):
            list(read_rows(path))


def test_what_is_not_printable_is_escaped_in_messages() -> None:
    error = DataError("f:1", "a\nb", "found '\x1b[2J', expected 'é'")
    assert str(error) == "f:1: field 'a\\nb': found '\\x1b[2J', expected 'é'"
    assert error.problem == "found '\x1b[2J', expected 'é'"


def test_a_gzip_file_that_is_damaged_and_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    whole = bytearray(gzip.compress(b'{"prompt": "caf\xe9"}'))
    whole[-8] ^= 1  # of the sum, which is looked at where the file ends
    path.write_bytes(whole)
    with pytest.raises(PrefoptError, match="not a readable gzip file"):
        list(read_rows(path))
