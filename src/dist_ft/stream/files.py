"""Rows of one data file, one after the other: JSONL, JSON, CSV, Parquet, Arrow or Feather, plain text.

A row that cannot be read is yielded with its problem, so that whoever reads decides what follows; a file that cannot
be read is an error. Memory holds a line, a batch of rows or, of a JSON or text file, the whole, up to a limit. What a
row means is `formats.py`'s.

A text file is one row. A row a line or a paragraph would cut prose at places that mean nothing; a long text is cut by
`data.long_samples`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dist_ft.errors import DataError
from dist_ft.printable import excerpt, printable

KINDS: Mapping[str, str] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text",
}  # fmt: skip
"""File name endings, and what they mean; those of text may have `.gz` behind them."""
MAX_LINE_BYTES = 256 << 20
"""Longest line of a JSONL file."""
MAX_WHOLE_BYTES = 256 << 20
"""Largest JSON file: it is read whole, which takes several times its size."""
MAX_TEXT_BYTES = 64 << 20
"""Largest text file: it is one row."""
_BATCH_ROWS = 256
_IN_BINARY = ("parquet", "arrow")


@dataclass(frozen=True)
class RawRow:
    """One row as the file has it.

    Attributes:
        place: `file:line` where rows are lines, else `file: row N`, counted from 1.
        data: The parsed row; the bare text where it cannot be parsed.
        problem: Why it cannot be used; None for a sound row.
    """

    place: str
    data: Any
    problem: str | None = None


@dataclass(frozen=True)
class DataFile:
    """A file to read.

    Attributes:
        path: Where it lies.
        kind: A value of `KINDS`.
        is_compressed: Whether it is a gzip file.
    """

    path: Path
    kind: str
    is_compressed: bool

    @property
    def shown(self) -> str:
        """The path, safe for a terminal."""
        return printable(str(self.path))

    @classmethod
    def at(cls, path: Path) -> DataFile:
        """Finds the kind by the name.

        Raises:
            DataError: It has no known ending.
        """
        is_compressed = path.suffix.lower() == ".gz"
        kind = KINDS.get((path.with_suffix("") if is_compressed else path).suffix.lower())
        if kind is None or (is_compressed and kind in _IN_BINARY):
            raise DataError(
                f"{printable(str(path))}: unknown kind of file; known endings are {', '.join(KINDS)}, "
                "and .gz behind those of text"
            )
        return cls(path, kind, is_compressed)


def read_file(file: DataFile) -> Iterator[RawRow]:
    """Yields the rows of a file in its order.

    Raises:
        DataError: The file cannot be read, or is damaged.
    """
    try:
        yield from _READERS[file.kind](file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.shown} is damaged: {error}; make it again") from error
    except OSError as error:
        reason = error.strerror or excerpt(str(error)).strip("'\"")
        raise DataError(f"{file.shown} cannot be read: {reason}; all machines must see it under this path") from error
    except pa.ArrowException as error:
        reason = excerpt(str(error)).strip("'\"")
        raise DataError(f"{file.shown} is not a sound {file.kind} file: {reason}; make it again") from error


def read_bytes(file: DataFile) -> Iterator[bytes]:
    """Yields the bytes of a file as it lies on disk, in blocks."""
    try:
        with file.path.open("rb") as opened:
            while block := opened.read(1 << 22):
                yield block
    except OSError as error:
        raise DataError(
            f"{file.shown} cannot be read: {error.strerror}; all machines must see it under this path"
        ) from error


def _read_lines(file: DataFile) -> Iterator[RawRow]:
    with _open(file) as opened:
        number = 0
        while line := opened.readline(MAX_LINE_BYTES):
            number += 1
            place = f"{file.shown}:{number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{place}: longer than {MAX_LINE_BYTES >> 20} MiB; a JSONL file has a row a line")
            if line.strip():
                yield _parse_line(place, line, is_first=number == 1)


def _parse_line(place: str, line: bytes, is_first: bool) -> RawRow:
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"not valid UTF-8 ({error.reason} at byte {error.start})"
        return RawRow(place, line.decode("utf-8", "backslashreplace"), problem)
    try:
        return RawRow(place, _parse_json(text))
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} (column {error.colno}); expected one object a line"
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, deep brackets
        problem = f"not usable JSON: {error}; expected one object a line"
    return RawRow(place, text.rstrip("\r\n"), problem)


def _read_json(file: DataFile) -> Iterator[RawRow]:
    """An array of rows, an object with one list of rows, or, as the hub has them, lines under this name."""
    with _open(file) as opened:
        has_lines = _begins_with_a_whole_object(opened)
    if has_lines:
        yield from _read_lines(file)
        return
    content = _read_whole(file, MAX_WHOLE_BYTES, "convert it to JSONL, a row a line")
    try:
        rows = _list_of_rows(_parse_json(content))
    except json.JSONDecodeError as error:
        raise DataError(f"{file.shown}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.shown}: not usable JSON: {error}") from error
    yield from (RawRow(f"{file.shown}: row {number}", row) for number, row in enumerate(rows, start=1))


def _begins_with_a_whole_object(opened: BinaryIO) -> bool:
    """Whether the first line is an object that ends there, with another line behind it."""
    lines = (line for line in iter(lambda: opened.readline(MAX_LINE_BYTES), b"") if line.strip())
    first = next(lines, b"").strip().removeprefix(b"\xef\xbb\xbf")
    if not first.startswith(b"{"):
        return False
    return isinstance(_parse_line("", first, is_first=True).data, dict) and next(lines, None) is not None


def _list_of_rows(data: Any) -> list[Any]:
    if isinstance(data, list):
        return data
    lists = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else []
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"found {found}, expected an array of rows, or an object with one list of them")
    return lists[0]


def _read_csv(file: DataFile) -> Iterator[RawRow]:
    # For the whole process, but only ever this value: the default of 128 KiB refuses long texts.
    csv.field_size_limit(MAX_LINE_BYTES)
    # Wrong bytes become half characters, so that the row is refused and not the file.
    with (
        _open(file) as opened,
        io.TextIOWrapper(opened, encoding="utf-8-sig", errors="surrogateescape", newline="") as text,
    ):
        rows = csv.reader(text, delimiter="\t" if file.kind == "tsv" else ",", strict=True)
        try:
            header = next(rows, [])
            if len(set(header)) != len(header):
                raise DataError(f"{file.shown}: the header {excerpt(header)} names a column twice")
            for number, cells in enumerate(filter(None, rows), start=1):
                yield _csv_row(f"{file.shown}: row {number}", header, cells)
        except csv.Error as error:  # where the next row begins is unknown
            raise DataError(f"{file.shown}:{rows.line_num}: not valid CSV: {error}") from error


def _csv_row(place: str, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(place, cells, f"{len(cells)} cells, but the header has {len(header)}; quote cells with commas")
    row = dict(zip(header, cells, strict=True))
    if any("\udc80" <= mark <= "\udcff" for cell in cells if not cell.isascii() for mark in cell):
        return RawRow(place, row, "not valid UTF-8; convert the file")
    return RawRow(place, row)


def _read_parquet(file: DataFile) -> Iterator[RawRow]:
    with pq.ParquetFile(file.path, memory_map=True, pre_buffer=False) as opened:
        yield from _number_rows(file, opened.iter_batches(batch_size=_BATCH_ROWS))


def _read_arrow(file: DataFile) -> Iterator[RawRow]:
    with pa.memory_map(str(file.path), "r") as source:
        yield from _number_rows(file, _arrow_batches(source))


def _arrow_batches(source: Any) -> Iterator[Any]:
    try:
        opened = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        opened = pa.ipc.open_stream(source)  # as the `datasets` library writes them
        batches = iter(opened)
    else:
        batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
    for batch in batches:
        yield from (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))


def _number_rows(file: DataFile, batches: Iterator[Any]) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for row in _rows_of(batch):
            number += 1
            problem = row if isinstance(row, str) else None
            yield RawRow(f"{file.shown}: row {number}", None if problem else _without_nulls(row), problem)


def _rows_of(batch: Any) -> list[dict[str, Any] | str]:
    """Returns rows, or in place of a row what is wrong with it."""
    try:
        return cast("list[dict[str, Any] | str]", batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return ["not valid UTF-8"]
        return [row for at in range(batch.num_rows) for row in _rows_of(batch.slice(at, 1))]


def _without_nulls(value: Any) -> Any:
    """Returns a value without the keys that are null: a columnar file gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _read_text(file: DataFile) -> Iterator[RawRow]:
    place = f"{file.shown}: row 1"
    content = _read_whole(file, MAX_TEXT_BYTES, "split it into several files, or make it rows of a JSONL file")
    try:
        yield RawRow(place, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        yield RawRow(place, None, f"not valid UTF-8 ({error.reason} at byte {error.start})")


def _read_whole(file: DataFile, limit: int, advice: str) -> bytes:
    with _open(file) as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{file.shown} is larger than {limit >> 20} MiB; {advice}")
    return content


@contextmanager
def _open(file: DataFile) -> Iterator[BinaryIO]:
    opener: Callable[[Path, str], Any] = gzip.open if file.is_compressed else open
    with opener(file.path, "rb") as opened:
        yield opened


def _parse_json(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {excerpt(twice)} stands twice; keep one")
    return made


_READERS: Mapping[str, Callable[[DataFile], Iterator[RawRow]]] = {
    "jsonl": _read_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "text": _read_text,
}
