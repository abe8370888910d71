"""Rows from files, folders, saved datasets and the Hugging Face Hub, alone or as a mixture."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from prefopt.errors import DataError, PrefoptError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_HELD_OUT = {"test", "validation", "valid", "val", "dev", "eval"}

Row = dict[str, Any]
LocatedRow = tuple[str, Row]


@dataclass(frozen=True, slots=True)
class Source:
    """One data set of a mixture.

    Attributes:
        path: A file, a folder, a dataset saved with ``save_to_disk``, or a Hub id.
        weight: How many times each row appears in one epoch; a fraction takes a random share.
        split: The split to read.
        name: The configuration of a Hub dataset.
        revision: The branch, tag or commit of a Hub dataset.

    Raises:
        PrefoptError: If the weight is not a finite number above 0.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    name: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise PrefoptError(
                f"{self.path}: weight is {self.weight}, expected a finite number above 0 "
                "(the times each row appears in one epoch)"
            )


def read_sources(sources: Sequence[Source], *, seed: int) -> Iterator[LocatedRow]:
    """Reads a weighted mixture, source by source and in file order; shuffling is the trainer's.

    A weight of 2 gives each row twice, 0.5 a random half of the rows, 1.5 each row once and a
    random half of them twice. Which rows the share holds depends on the seed and on the source's
    position in the list only. A source with a fractional weight is read twice, once to count.

    Args:
        sources: What to mix.
        seed: Selects the shares.

    Yields:
        (where, row) as `read_rows` does; the copies of a row keep its place.

    Raises:
        PrefoptError: As `read_rows`, and if a weight is too small to give a single row.
    """
    for position, source in enumerate(sources):
        copies = int(source.weight)
        share = _random_share(source, random.Random(f"{seed}/{position}"))
        for index, located in enumerate(_read(source)):
            for _ in range(copies + (index in share)):
                yield located


def _random_share(source: Source, generator: random.Random) -> set[int]:
    fraction = source.weight % 1
    if not fraction:
        return set()
    count = sum(1 for _ in _read(source))
    size = int(fraction * count + 0.5)
    if source.weight < 1 and not size:
        raise PrefoptError(
            f"{source.path}: weight {source.weight} of {count:,} rows gives no row; raise the "
            "weight or leave the source out"
        )
    return set(generator.sample(range(count), size))


def _read(source: Source) -> Iterator[LocatedRow]:
    return read_rows(source.path, split=source.split, name=source.name, revision=source.revision)


def read_rows(
    path: str | Path, *, split: str = "train", name: str | None = None, revision: str | None = None
) -> Iterator[LocatedRow]:
    """Reads the rows of one data set, whatever it is kept in.

    Args:
        path: JSON lines, a JSON list or Parquet (`SUFFIXES`), a folder of such files, a dataset
            saved with ``save_to_disk``, or else a Hub id such as ``owner/name``.
        split: The split. In a folder it selects the files named after it (``test.jsonl``,
            ``test-00000-of-00002.parquet``); "train" takes all files where none is named after a
            split. A single file has no splits besides its own name.
        name: The configuration of a Hub dataset.
        revision: The branch, tag or commit of a Hub dataset.

    Yields:
        (where, row), where being ``file:row`` with rows counted from 1; in JSON lines it is the
        line number.

    Raises:
        PrefoptError: If there is no such data set, split or row, or a file cannot be read. A path
            that does not exist raises at once, the contents of a file when they are reached.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "pairs.jsonl")
    >>> _ = path.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}')
    >>> [(where, row)] = read_rows(path)
    >>> where == f"{path}:1", row["chosen"]
    (True, '2')
    """
    local = Path(path).expanduser()
    if local.exists() and (name or revision):
        raise PrefoptError(
            f"{path}: 'name' and 'revision' belong to a Hub dataset, and this is a local path; "
            "leave them out"
        )
    if any((local / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        rows = _read_saved(local, split)
    elif local.is_dir():
        rows = chain.from_iterable(_read_file(file) for file in _files_of_split(local, split))
    elif local.exists():
        if split not in ("train", _split_name(local)):
            raise PrefoptError(
                f"{path}: no split {split!r}; a single file has no splits: leave 'split' out"
            )
        rows = _read_file(local)
    elif _looks_local(str(path)):
        raise PrefoptError(
            f"{path}: no such file or folder; check the path, seen from {Path.cwd()}"
        )
    else:
        rows = _read_hub(str(path), split, name, revision)
    return _at_least_one(rows, path)


def _at_least_one(rows: Iterator[LocatedRow], path: str | Path) -> Iterator[LocatedRow]:
    first = next(rows, None)
    if first is None:
        raise PrefoptError(f"{path}: no rows; expected at least one")
    yield first
    yield from rows


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist can only have meant a file: Hub ids are owner/name."""
    return path.startswith((".", "/", "~")) or path.endswith(SUFFIXES) or path.count("/") > 1


def _split_name(file: Path) -> str:
    """The file's name without suffix and shard number: train-00000-of-00004.parquet is train."""
    return re.sub(r"-\d+-of-\d+$", "", file.name.split(".", maxsplit=1)[0])


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise PrefoptError(
            f"{folder}: no data file in this folder (subfolders are not searched); expected "
            f"{', '.join(SUFFIXES)}"
        )
    chosen = [file for file in files if _split_name(file) == split]
    names = {_split_name(file) for file in files}
    if not chosen and split == "train" and not names & _HELD_OUT:
        return files
    if not chosen:
        raise PrefoptError(
            f"{folder}: no split {split!r}; its files are named {', '.join(sorted(names))}: set "
            "'split' to one of these, or 'path' to a file"
        )
    return chosen


def _read_file(file: Path) -> Iterator[LocatedRow]:
    if not file.name.endswith(SUFFIXES):
        raise PrefoptError(
            f"{file}: unsupported extension {file.suffix!r}; expected {', '.join(SUFFIXES)}"
        )
    try:
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
        else:
            try:
                with _open_text(file) as handle:
                    yield from _read_json(handle, file)
            except UnicodeDecodeError as error:
                raise _not_text(file, error) from error  # it reads the file once more
    except EOFError as error:
        raise PrefoptError(
            f"{file}: the gzip stream ends early, so the file is truncated; copy or download it "
            "again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise PrefoptError(
            f"{file}: not a readable gzip file ({error}); copy or download it again"
        ) from error
    except OSError as error:
        raise PrefoptError(f"{file}: cannot be read ({error.strerror or error})") from error


def _open_text(file: Path) -> IO[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8-sig", newline="\n")


def _not_text(file: Path, error: UnicodeDecodeError) -> PrefoptError:
    """What to say of a file that is not UTF-8, with the first line that is not."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as handle:
        line = next(number for number, line in enumerate(handle, start=1) if not _is_utf8(line))
        handle.seek(0)
        start = handle.read(2)
    remedy = "convert it"
    if start == b"\x1f\x8b":
        remedy = "it begins as gzip does: let its name end in .gz"
    elif start in (b"\xff\xfe", b"\xfe\xff"):
        remedy = "it begins as UTF-16 does: convert it"
    where = f"{file}:{line}"
    return PrefoptError(f"{where}: not UTF-8 text ({error.reason}); {remedy}", where=where)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_json(handle: IO[str], file: Path) -> Iterator[LocatedRow]:
    """One object a line; files called .json may hold one list instead."""
    if ".jsonl" not in file.name:
        start = handle.read(64).lstrip()
        handle.seek(0)
        if start.startswith("["):
            yield from _read_list(handle.read(), file)
            return
    for number, line in enumerate(handle, start=1):
        if line := line.rstrip():
            yield f"{file}:{number}", _check_row(_parse(line, file, number), f"{file}:{number}")


def _read_list(text: str, file: Path) -> Iterator[LocatedRow]:
    for number, row in enumerate(_parse(text, file, first_line=1), start=1):
        yield f"{file}:{number}", _check_row(row, f"{file}:{number}")


def _parse(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        expected = "one object on each line"
        if ".jsonl" not in file.name:
            expected += ", or one list of objects"
        line = first_line + error.lineno - 1
        raise PrefoptError(
            f"{file}: invalid JSON on line {line}, column {error.colno} ({error.msg}); expected "
            f"{expected}",
            where=f"{file}:{line}",
        ) from error
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise PrefoptError(
            f"{file}:{first_line}: found a whole number of thousands of digits; shorten it, or "
            "write it as text"
        ) from error
    except RecursionError as error:
        raise PrefoptError(
            f"{file}:{first_line}: lists or objects are nested too deeply to be read; expected "
            "messages or text"
        ) from error


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise PrefoptError(
            f"{where}: found a JSON {_JSON_NAMES[type(row)]}, expected an object such as "
            '{"prompt": ..., "chosen": ..., "rejected": ...}',
            where=where,
        )
    return row


_JSON_NAMES = {
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "true/false",
    type(None): "null",
}


def _read_parquet(file: Path) -> Iterator[LocatedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            for row in _python_rows(batch, file, number):
                number += 1
                yield f"{file}:{number}", row
    except pyarrow.ArrowException as error:
        raise PrefoptError(
            f"{file}: not a readable Parquet file ({_first_line(error)}); copy or download it again"
        ) from error


# a date after the year 9999, text that is not UTF-8, a time zone that nobody knows
_NO_VALUE = (ArithmeticError, LookupError, ValueError)


def _python_rows(batch: pyarrow.RecordBatch, file: Path, before: int) -> list[Row]:
    """The rows of a batch, of which `before` precede it in the file."""
    try:
        return batch.to_pylist()
    except _NO_VALUE:
        for number, name in product(range(batch.num_rows), batch.schema.names):
            try:
                batch.column(name)[number].as_py()
            except _NO_VALUE as error:
                raise DataError(
                    f"{file}:{before + number + 1}",
                    name,
                    f"found a value that cannot be read ({_first_line(error)}); remove the column "
                    "or write it as text",
                ) from error
        raise


def _read_saved(folder: Path, split: str) -> Iterator[LocatedRow]:
    import datasets
    import pyarrow

    # a file that is JSON, but not what datasets has written, is known by a type or name it lacks
    unlike = (*_NO_VALUE, AttributeError, RecursionError, TypeError)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, *unlike, pyarrow.ArrowException) as error:
        raise PrefoptError(
            f"{folder}: cannot be read as a saved dataset ({_first_line(error)}); save it again"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise PrefoptError(
                f"{folder}: no split {split!r}; this dataset has {', '.join(sorted(dataset))}"
            )
        return _located(dataset[split], f"{folder}[{split}]")
    if split not in ("train", str(dataset.split)):
        raise PrefoptError(
            f"{folder}: no split {split!r}; it was saved without splits: leave 'split' out"
        )
    return _located(dataset, str(folder))


def _read_hub(
    path: str, split: str, name: str | None, revision: str | None
) -> Iterator[LocatedRow]:
    import datasets

    try:
        dataset = datasets.load_dataset(path, name, split=split, revision=revision)
    except (FileNotFoundError, ConnectionError) as error:
        raise PrefoptError(
            f"{path}: neither a local file or folder, nor found on the Hugging Face Hub "
            f"({_first_line(error)}); check the spelling, the network and your access"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # An unknown split or configuration, a data set that needs a script, a failed download.
        raise PrefoptError(
            f"{path}: split {split!r}, name {name!r}, revision {revision!r} cannot be loaded from "
            f"the Hugging Face Hub: {_first_line(error)}"
        ) from error
    return _located(dataset, f"{path}[{split}]")


def _located(dataset: Any, label: str) -> Iterator[LocatedRow]:
    import pyarrow

    number = 0
    try:
        # a stored format leaves columns out, or makes frames of rows
        for number, row in enumerate(dataset.with_format(None), start=1):
            yield f"{label}:{number}", row
    except (*_NO_VALUE, OSError, pyarrow.ArrowException) as error:
        where = f"{label}:{number + 1}"
        raise PrefoptError(
            f"{where}: found a value that cannot be read ({_first_line(error)}); remove the row, "
            "or write its column as text",
            where=where,
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
