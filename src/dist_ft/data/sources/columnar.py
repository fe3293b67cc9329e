"""Reads the rows of Parquet and Arrow files, from the whole file or a range of row groups or record batches.

For a Parquet file, memory holds a batch of rows and a buffer per column; for an Arrow file, a record batch. No file is
mapped, because the pages that were read would count as memory of the process.

Values of Arrow's type `arrow.json`, which the `datasets` library gives to what differs from row to row (tools, turns,
arguments), are stored as text and read as what the text holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from dist_ft.data.sources.location import RawRow, RowLocation, RowsBefore
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.data.sources.strict_json import parse_json

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def read_parquet(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    """Yield the rows of row groups `start` to `stop`."""
    with _opened(file) as source, _parquet(source) as opened:
        groups = range(start, opened.num_row_groups if stop is None else stop)
        first = sum(opened.metadata.row_group(group).num_rows for group in range(start))
        batches = opened.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups), use_threads=False)
        yield from _number_rows(file, batches, first, None)


def read_arrow(file: SourceFile, start: int, stop: int | None) -> Iterator[RawRow]:
    """Yield the rows of record batches `start` to `stop`."""
    before = RowsBefore(partial(_count_rows, file, start)) if start else None
    with _opened(file) as source:
        yield from _number_rows(file, _arrow_batches(source, start, stop), 0, before)


def parquet_sizes(file: SourceFile) -> list[int]:
    """Return the stored bytes of each row group, from the footer alone."""
    with _opened(file) as source, _parquet(source) as opened:
        groups = (opened.metadata.row_group(number) for number in range(opened.num_row_groups))
        return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]


def arrow_sizes(file: SourceFile) -> list[int]:
    """Return the stored bytes of each record batch, from the footer alone.

    All are assumed to be equally large, as writers make them. An Arrow stream has no footer and counts as one batch.
    """
    with _opened(file) as source:
        try:
            count = pa.ipc.open_file(source).num_record_batches
        except pa.ArrowInvalid:
            count = 1
        return [file.size // max(1, count)] * count


def _parquet(source: Any) -> Any:
    return pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)


@contextmanager
def _opened(file: SourceFile) -> Iterator[Any]:
    if not file.is_remote:
        with pa.OSFile(file.address, "rb") as source:
            yield source
        return
    with file.open() as stored, pa.PythonFile(stored, mode="r") as source:
        yield source


def _arrow_batches(source: Any, start: int, stop: int | None) -> Iterator[Any]:
    try:
        opened = pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        batches = iter(pa.ipc.open_stream(source))  # as the `datasets` library writes them
    else:
        end = opened.num_record_batches if stop is None else stop
        batches = (opened.get_batch(number) for number in range(start, end))
    for batch in batches:
        yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, batch.num_rows, _BATCH_ROWS))


def _count_rows(file: SourceFile, stop: int) -> int:
    with _opened(file) as source:
        opened = pa.ipc.open_file(source)
        return sum(opened.get_batch(number).num_rows for number in range(stop))


def _number_rows(file: SourceFile, batches: Iterator[Any], first: int, before: RowsBefore | None) -> Iterator[RawRow]:
    number, shown = first, file.shown
    for batch in batches:
        decode = _decoder(pa.struct(list(batch.schema)))
        for row in _rows_of(batch):
            number += 1
            location = RowLocation(shown, number, "row", before)
            if isinstance(row, str):
                yield RawRow(location, None, row)
                continue
            kept = _without_nulls(row)
            try:
                yield RawRow(location, decode(kept) if decode else kept)
            except (ValueError, RecursionError) as error:
                yield RawRow(location, kept, f"a value of type arrow.json is not usable JSON: {error}")


def _rows_of(batch: Any) -> list[dict[str, Any] | str]:
    """Return the rows of a batch; a string in place of a row describes its problem."""
    try:
        return cast("list[dict[str, Any] | str]", batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return ["not valid UTF-8"]
        return [row for at in range(batch.num_rows) for row in _rows_of(batch.slice(at, 1))]


def _without_nulls(value: Any) -> Any:
    """Return a value without its null keys, because a columnar file gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


_Decode = Callable[[Any], Any]


def _decoder(kind: Any) -> _Decode | None:
    """Return the function that parses the JSON in values of a type; None if there is none in it."""
    if isinstance(kind, pa.JsonType):
        return lambda value: parse_json(value) if isinstance(value, str) else value
    if pa.types.is_struct(kind):
        inner = {field.name: found for field in kind.fields if (found := _decoder(field.type))}
        return partial(_decode_fields, inner) if inner else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        found = _decoder(kind.value_type)
        return partial(_decode_items, found) if found else None
    return None


def _decode_fields(inner: dict[str, _Decode], value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: inner[key](item) if key in inner else item for key, item in value.items()}


def _decode_items(decode: _Decode, value: Any) -> Any:
    return [decode(item) for item in value] if isinstance(value, list) else value
