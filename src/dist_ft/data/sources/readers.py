"""Reads the rows of a data file, or of a piece of it: JSONL, JSON, CSV, Parquet, Arrow or Feather, plain text.

A row that cannot be read is yielded with its problem, so that the caller decides what follows; a file that cannot be
read is an error. Memory holds a line, a batch of rows or, for a JSON or text file, the whole file up to a limit.
`formats.py` interprets the rows.

A text file is one row: rows of a line or a paragraph would cut prose at arbitrary places. `data.long_samples` cuts a
long text.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, cast

import pyarrow as pa
import zstandard

from dist_ft.config.paths import EMBEDDED_PREFIX
from dist_ft.data.sources.columnar import arrow_sizes, parquet_sizes, read_arrow, read_parquet
from dist_ft.data.sources.generated import embedded_rows
from dist_ft.data.sources.location import RawRow, RowLocation, RowsBefore
from dist_ft.data.sources.source_file import EMBEDDED, SourceFile
from dist_ft.data.sources.strict_json import parse_json
from dist_ft.errors import DataError, StorageError
from dist_ft.file_kinds import MAX_POINTER_BYTES, describe_pointer
from dist_ft.printable import excerpt

MAX_LINE_BYTES = 256 << 20
"""Longest line of a JSONL file."""
MAX_WHOLE_BYTES = 256 << 20
"""Largest JSON file. It is read whole, which takes several times its size in memory."""
MAX_TEXT_BYTES = 64 << 20
"""Largest text file. It is one row."""
MAX_COUNTED_BYTES = 1 << 30
"""Bytes of a file up to which lines are counted to name a row; a later row is named by its byte."""
_BLOCK_BYTES = 1 << 22
_UTF_16 = "UTF-16, which Windows programs like to write; save the file as UTF-8"


def read_piece(file: SourceFile, start: int = 0, stop: int | None = None) -> Iterator[RawRow]:
    """Yield the rows of a file in file order.

    Args:
        file: The file.
        start: First byte of a JSONL file, row group of a Parquet file or record batch of an Arrow file.
        stop: One more than the last; None means the end. A line belongs to the piece in which it starts.

    Raises:
        DataError: The file cannot be read, or is damaged.
    """
    try:
        if file.is_remote:  # the listing has looked at local files
            refuse_pointer(file)
        yield from READERS[file.kind].rows(file, start, stop)
    except DAMAGED as error:
        raise DataError(f"{file.shown} is damaged: {error}; make it again") from error
    except pa.ArrowException as error:
        reason = excerpt(str(error)).strip("'\"")
        raise DataError(f"{file.shown} is not a sound {file.kind} file: {reason}; make it again") from error
    except StorageError as error:  # its message names the file
        raise DataError(str(error)) from error
    except OSError as error:
        if file.compression == "bzip2" and error.errno is None:
            raise DataError(f"{file.shown} is damaged: {error}; make it again") from error
        raise DataError(cannot_read(file.shown, error)) from error


def refuse_pointer(file: SourceFile) -> None:
    """Check that a file is not a pointer to the data; a reader of text would train on it.

    Raises:
        DataError: It is one; the message says of what.
        OSError, StorageError: It cannot be read.
    """
    if 0 < file.size <= MAX_POINTER_BYTES and file.kind != EMBEDDED:
        with file.open() as stored:
            pointer = describe_pointer(stored.read(MAX_POINTER_BYTES))
        if pointer:
            raise DataError(f"{file.shown} is {pointer}")


def cannot_read(shown: str, error: OSError) -> str:
    """Return the message that a local file cannot be read."""
    reason = error.strerror or excerpt(str(error)).strip("'\"")
    return f"{shown} cannot be read: {reason}; all machines must see it under this path"


def _read_embedded(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    for number, row in enumerate(embedded_rows(file.address.removeprefix(EMBEDDED_PREFIX)), start=1):
        yield RawRow(RowLocation(file.address, number, "line"), row)


def _read_lines(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    with _open(file) as opened:
        at = _first_line(opened, start)
        before = RowsBefore(partial(_count_lines, file, at)) if at else None
        shown, is_far, number = file.shown, at > MAX_COUNTED_BYTES, 0
        while (stop is None or at < stop) and (line := opened.readline(MAX_LINE_BYTES)):
            number += 1
            place = RowLocation(shown, at, "byte") if is_far else RowLocation(shown, number, "line", before)
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise DataError(f"{place}: longer than {MAX_LINE_BYTES >> 20} MiB; a JSONL file has a row a line")
            if line.strip():
                yield _parse_line(place, line, is_first=at == 0)
            at += len(line)


def _first_line(opened: BinaryIO, start: int) -> int:
    """Seeks to the first line that starts at or after a byte, and returns its offset."""
    if start == 0:
        return 0
    at = opened.seek(start - 1)
    while rest := opened.readline(MAX_LINE_BYTES):
        at += len(rest)
        if rest.endswith(b"\n"):
            break
    return at


def _count_lines(file: SourceFile, stop: int) -> int:
    count, left = 0, stop
    with file.open() as stored:
        while left and (block := stored.read(min(left, _BLOCK_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _parse_line(place: RowLocation, line: bytes, is_first: bool) -> RawRow:
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        return RawRow(place, line.decode("utf-8", "backslashreplace"), _not_utf8(line, error))
    try:
        return RawRow(place, parse_json(text))
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} (column {error.colno}); expected one object a line"
        if "\0" in text:
            problem = f"not valid JSON, with NUL characters as {_UTF_16}"
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, deep brackets
        problem = f"not usable JSON: {error}; expected one object a line"
    return RawRow(place, text.rstrip("\r\n"), problem)


def _read_json(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    """Yield the rows of a JSON file: an array, an object with one list of rows, or (as on the hub) JSON lines."""
    with _open(file) as opened:
        has_lines = _begins_with_a_whole_object(opened)
    if has_lines:
        yield from _read_lines(file, start, stop)
        return
    content = _read_whole(file, MAX_WHOLE_BYTES, "convert it to JSONL, a row a line")
    try:
        rows = _list_of_rows(parse_json(content))
    except json.JSONDecodeError as error:
        raise DataError(f"{file.shown}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.shown}: not usable JSON: {error}") from error
    yield from (RawRow(RowLocation(file.shown, number, "row"), row) for number, row in enumerate(rows, start=1))


def _begins_with_a_whole_object(opened: BinaryIO) -> bool:
    """Return whether the first line is a whole object and another line follows."""
    lines = (line for line in iter(lambda: opened.readline(MAX_LINE_BYTES), b"") if line.strip())
    first = next(lines, b"").strip().removeprefix(b"\xef\xbb\xbf")
    if not first.startswith(b"{"):
        return False
    return (
        isinstance(_parse_line(RowLocation("", 1, "line"), first, is_first=True).data, dict)
        and next(lines, None) is not None
    )


def _list_of_rows(data: Any) -> list[Any]:
    if isinstance(data, list):
        return data
    lists = [value for value in data.values() if isinstance(value, list)] if isinstance(data, dict) else []
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"found {found}, expected an array of rows, or an object with one list of them")
    return lists[0]


def _read_csv(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    # The limit holds for the whole process, but is always this value; the default of 128 KiB refuses long texts.
    csv.field_size_limit(MAX_LINE_BYTES)
    # Invalid bytes become surrogates, so that the row is refused and not the file.
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
                yield _csv_row(RowLocation(file.shown, number, "row"), header, cells)
        except csv.Error as error:  # the start of the next row is unknown
            raise DataError(f"{file.shown}:{rows.line_num}: not valid CSV: {error}") from error


def _csv_row(place: RowLocation, header: list[str], cells: list[str]) -> RawRow:
    if len(cells) != len(header):
        return RawRow(place, cells, f"{len(cells)} cells, but the header has {len(header)}; quote cells with commas")
    row = dict(zip(header, cells, strict=True))
    if any("\udc80" <= mark <= "\udcff" for cell in cells if not cell.isascii() for mark in cell):
        return RawRow(place, row, "not valid UTF-8; convert the file")
    return RawRow(place, row)


def _read_text(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    place = RowLocation(file.shown, 1, "row")
    content = _read_whole(file, MAX_TEXT_BYTES, "split it into several files, or make it rows of a JSONL file")
    try:
        yield RawRow(place, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        yield RawRow(place, None, _not_utf8(content, error))


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """Return what is wrong with bytes from the beginning of a line or a file."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _UTF_16
    return f"not valid UTF-8 ({error.reason} at byte {error.start})"


def _read_whole(file: SourceFile, limit: int, advice: str) -> bytes:
    with _open(file) as opened:
        content = opened.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{file.shown} is larger than {limit >> 20} MiB; {advice}")
    return content


@contextmanager
def _open(file: SourceFile) -> Iterator[BinaryIO]:
    with file.open() as stored, decompressed(stored, file.compression) as opened:
        yield opened


@dataclass(frozen=True)
class Reader:
    """Describes how files of one kind are read.

    Attributes:
        rows: Yields the rows from a start to a stop, which count bytes, row groups or record batches.
        group_sizes: Returns the stored bytes of each group of rows, if groups can be read separately.
        is_cut_at_bytes: Whether the rows between any two bytes can be read separately.
    """

    rows: Callable[[SourceFile, int, int | None], Iterator[RawRow]]
    group_sizes: Callable[[SourceFile], list[int]] | None = None
    is_cut_at_bytes: bool = False


READERS: Mapping[str, Reader] = {
    "jsonl": Reader(_read_lines, is_cut_at_bytes=True),
    "json": Reader(_read_json),
    "csv": Reader(_read_csv),
    "tsv": Reader(_read_csv),
    "parquet": Reader(read_parquet, parquet_sizes),
    "arrow": Reader(read_arrow, arrow_sizes),
    "text": Reader(_read_text),
    EMBEDDED: Reader(_read_embedded),
}
"""Readers by the name of a `FileKind`."""


DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""Errors that damaged bytes raise; bzip2 raises an `OSError` without an errno."""

_TEXT_BUFFER_BYTES = 1 << 18
_READ_BYTES = 1 << 15  # read of a zstd file at once: a few bytes can expand to very much text


def decompressed(stored: BinaryIO, compression: str | None) -> BinaryIO:
    """Return a stream of the decompressed bytes; closing it leaves `stored` open."""
    if compression is None:
        return stored
    return io.BufferedReader(cast("io.RawIOBase", _DECOMPRESSORS[compression](stored)), _TEXT_BUFFER_BYTES)


class _Zstd(io.RawIOBase):
    """Reads consecutive Zstandard frames. The library's own reader accepts a truncated file as whole."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stored.read(_READ_BYTES)
            if not data:
                if self._is_inside:
                    raise EOFError("Compressed file ended before the end of a frame")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        text = []
        while data:
            text.append(self._frame.decompress(data))
            self._is_inside = not self._frame.eof
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(text)


_DECOMPRESSORS: Mapping[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda stored: gzip.GzipFile(fileobj=stored),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _Zstd,
}
