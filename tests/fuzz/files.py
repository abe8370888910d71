"""The readers of data: JSON of all kinds, gzip, Parquet, folders; whole, changed and cut off."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from shutil import rmtree
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fuzz.rows import rows
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
from prefopt.data.rows import parse_pair, validate
from prefopt.data.sources import SUFFIXES, read_rows
from prefopt.errors import PrefoptError


def read_bytes(content: bytes) -> None:
    """Any bytes, whatever the file's name says that they are."""
    for suffix in SUFFIXES:
        read_file(file_of(f"data{suffix}", content))


def read_file(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """The rows of a file, each with its place; a refusal names the file."""
    found = attempt(lambda: list(read_rows(path)))
    if isinstance(found, PrefoptError):
        assert str(found).startswith(str(path))
        return None
    numbers = [int(where.removeprefix(f"{path}:")) for where, _ in found]
    assert numbers == sorted({*numbers})
    assert all(isinstance(row, dict) for _, row in found)
    attempt(validate, found, parse_pair)
    return found


def read_json(case: tuple[list[dict[str, Any]], str]) -> None:
    """Rows that were written come back as they were, from each kind of JSON."""
    written, kind = case
    content = json.dumps(written).encode() if kind.startswith("list") else json_lines(written)
    if "bom" in kind:
        content = b"\xef\xbb\xbf" + content
    name = "data.json" if kind.startswith("list") else "data.jsonl"
    if "gz" in kind:
        name, content = f"{name}.gz", gzip.compress(content, 1)
    path = file_of(name, content)
    found = read_file(path)
    assert found is not None
    assert [where for where, _ in found] == [f"{path}:{n}" for n in range(1, len(written) + 1)]
    assert json.dumps([row for _, row in found]) == json.dumps(written)


JSON_FILES = Target(
    st.tuples(
        st.lists(rows, min_size=1, max_size=3),
        st.sampled_from(["lines", "list", "lines bom", "list bom", "lines gz", "list bom gz"]),
    ),
    read_json,
)

_lines = st.lists(rows, min_size=1, max_size=2)
DATA_FILES = Target(
    edited(_lines.map(json_lines), JSON_PIECES)
    | edited(_lines.map(json.dumps).map(str.encode), JSON_PIECES)
    | edited(edited(_lines.map(json_lines), JSON_PIECES).map(gzip.compress), [b"\x1f\x8b"]),
    read_bytes,
    {
        "5,000 digits": b'{"prompt": ' + b"9" * 5000 + b"}",
        "5,000 digits in a list": b"[" + b"9" * 5000 + b"]",
        "100,000 brackets": DEEP,
    },
    raw=True,
)

# --- Parquet -------------------------------------------------------------------------------------

FLAT = [
    *(pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.int8(), pa.int64(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64(), pa.date32(), pa.date64(), pa.null()),
    *(pa.time32("s"), pa.time64("us"), pa.time64("ns"), pa.duration("us"), pa.duration("ns")),
    *(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")),
    *(pa.timestamp("us", zone) for zone in ("UTC", "+05:30", "Europe/Paris", "Nowhere/Town")),
    *(pa.decimal128(38, 10), pa.decimal256(76, 0), pa.dictionary(pa.int32(), pa.string())),
]
types = st.recursive(
    st.sampled_from(FLAT),
    lambda inner: (
        inner.map(pa.list_)
        | st.lists(inner, max_size=2).map(
            lambda ts: pa.struct([(f"f{i}", t) for i, t in enumerate(ts)])
        )
        | inner.map(lambda t: pa.map_(pa.string(), t))
    ),
    max_leaves=3,
)
names = st.sampled_from(["prompt", "chosen", "rejected", "messages", "a\nb", "", "é"])
turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Parquet with columns of any type whose cells are any bits, and any of them null."""
    size = draw(st.integers(0, 3))
    columns = draw(st.lists(st.tuples(names, types | st.just(turns)), max_size=4))
    bits = draw(st.binary(min_size=64, max_size=64))
    arrays = [_array(type_, size, bits[3 * n :], draw(st.booleans())) for n, (_, type_) in
              enumerate(columns)]  # fmt: skip
    table = pa.Table.from_arrays(arrays, names=[name for name, _ in columns])
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink, compression=draw(st.sampled_from(["none", "zstd", "gzip"])))
    except (pa.ArrowException, OverflowError):  # a type or a value that Parquet has no place for
        return b"PAR1"
    return sink.getvalue()


def _array(kind: pa.DataType, size: int, bits: bytes, nulls: bool) -> pa.Array:
    """An array of `size` cells whose values are the bits themselves, as far as the type has any."""
    if pa.types.is_null(kind):
        return pa.nulls(size)
    if pa.types.is_dictionary(kind):
        return pa.array((["x", None, "y"] * size)[:size], pa.string()).dictionary_encode()
    validity = pa.py_buffer(bits[:16]) if nulls else None
    if pa.types.is_struct(kind):
        children = [_array(f.type, size, bits[1:], nulls) for f in kind]
        return pa.Array.from_buffers(kind, size, [validity], children=children)
    offsets = [0, *(sum(b % 3 for b in bits[: n + 1]) for n in range(size))]
    wide = pa.types.is_large_string(kind)
    starts = pa.array(offsets, pa.int64() if wide else pa.int32()).buffers()[1]
    if pa.types.is_list(kind):
        inner = _array(kind.value_type, offsets[-1], bits[1:], nulls)
        return pa.Array.from_buffers(kind, size, [validity, starts], children=[inner])
    if pa.types.is_map(kind):
        inner = _array(pa.struct([kind.key_field, kind.item_field]), offsets[-1], bits[1:], False)
        return pa.Array.from_buffers(kind, size, [validity, starts], children=[inner])
    if pa.types.is_string(kind) or wide or pa.types.is_binary(kind):
        return pa.Array.from_buffers(kind, size, [validity, starts, pa.py_buffer(bits * 4)])
    return pa.Array.from_buffers(kind, size, [validity, pa.py_buffer(bits * 32)])


def read_parquet(content: bytes) -> None:
    """A Parquet file of any kind."""
    read_file(file_of("data.parquet", content))


def _one_column(array: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": array}), sink)
    return sink.getvalue()


_two_alike = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
PARQUET_FILES = Target(
    edited(tables(), [b"PAR1", b"\x00", b"\xff" * 4]) | tables(),
    read_parquet,
    {
        "a date after the year 9999": _one_column(pa.array([2**31 - 1], pa.date32())),
        "a time after midnight": _one_column(pa.array([2**62], pa.time64("us"))),
        "two fields of the same name": _one_column(_two_alike),
    },
)

# --- folders -------------------------------------------------------------------------------------

FILES = ["train", "test", "train-00000-of-00002", "train-00001-of-00002", "a.b", "", "validation"]
SAVED = ["dataset_dict.json", "state.json", "dataset_info.json"]  # of datasets' save_to_disk
_keys = st.sampled_from(["splits", "_data_files", "filename", "features", "_split", "_type"])
_facts = (plain | st.dictionaries(_keys, plain | st.lists(st.dictionaries(_keys, plain)))).map(
    lambda value: json.dumps(value).encode()
)
folders = st.tuples(
    st.dictionaries(
        st.builds(
            "{}{}".format,
            st.sampled_from(FILES),
            st.sampled_from([*SUFFIXES, ".txt", ""]),
        ).filter(bool),
        st.just(b"") | st.just(b'{"prompt": "x"}\n') | edited(_lines.map(json_lines), JSON_PIECES),
        max_size=3,
    )
    | st.dictionaries(
        st.sampled_from(SAVED), _facts | edited(_facts, JSON_PIECES), min_size=1, max_size=3
    ),
    st.sampled_from(["train", "test", "validation", "", "a"]),
)


def read_folder(case: tuple[dict[str, bytes], str]) -> None:
    """A folder of files of any names, and any split of it."""
    files, split = case
    folder = scratch() / "folder"
    rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = attempt(lambda: list(read_rows(folder, split=split)))
    if isinstance(found, PrefoptError):
        assert str(folder) in str(found)
    else:
        assert all(where.startswith(str(folder)) for where, _ in found)


FOLDERS = Target(
    folders,
    read_folder,
    {
        f"100,000 brackets in {name}": ({"dataset_info.json": b"{}", name: DEEP}, "train")
        for name in SAVED
    },
)
