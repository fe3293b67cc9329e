"""Reads the rows of a source, each with its location, its record and the hash that chooses its side of a split.

Joins the listing of files (`listing.py`), the readers (`readers.py`) and the formats (`formats.py`). The caller decides
what happens to a bad row: `scan_part` and `scan_rows` yield it, `read_rows` raises. The renderer turns records into
tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import xxhash

from dist_ft.config.data_sections import DataConfig, PromptFormat, RowSource
from dist_ft.data.rows.formats import READING_VERSION, read_record, unread_keys
from dist_ft.data.sources.listing import check_unchanged, list_files
from dist_ft.data.sources.location import RawRow, RowLocation
from dist_ft.data.sources.parts import Part, whole
from dist_ft.data.sources.source_file import EMBEDDED
from dist_ft.errors import DataError
from dist_ft.records import Record
from dist_ft.storage.urls import shown_url

_ASKING = {"messages": "messages", "conversations": "conversations", "prompt": "completion", "instruction": "output"}
"""The key that asks → the key that answers."""


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        location: Where the row is in its file.
        record: The content of the row.
        key: Hash of the content, or of the group's name, which decides whether the row is held out.
        raw: The row as the file has it.
        unread: Keys of the row, and of what is in it, to which nothing gives a meaning.
    """

    location: RowLocation
    record: Record
    key: int
    raw: Any
    unread: frozenset[str] = frozenset()

    @property
    def place(self) -> str:
        """The location as `file:line` or `file: row N`, for messages. May count the lines before a piece of a file."""
        return str(self.location)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        location: Where the row is in its file.
        problem: What is wrong and how to mend it.
        raw: The row as the file has it: parsed, or as text if it could not be parsed.
    """

    location: RowLocation
    problem: str
    raw: Any

    @property
    def place(self) -> str:
        """See `Row`."""
        return str(self.location)

    def error(self) -> DataError:
        """Return an error that names the location and the problem."""
        return DataError(f"{self.place}: {self.problem}")


def reading_key(source: RowSource, part: Part) -> list[object]:
    """Return what the records of a part depend on besides its bytes, the format and the columns.

    It is empty where no row can have turns, so that a new version of how turns are read changes nothing there.
    """
    if source.format == "text" or all(piece.file.kind in (EMBEDDED, "text") for piece in part.pieces):
        return []
    prompt = source.prompt.model_dump() if isinstance(source.prompt, PromptFormat) else source.prompt
    return ["reading", READING_VERSION, sorted(source.ignore), *([prompt] if prompt else [])]


def scan_part(part: Part, source: RowSource, group_by: str | None = None) -> Iterator[Row | BadRow]:
    """Yield every row of a part in order, including bad rows; memory holds a line or a batch of rows.

    Args:
        part: The part; its files must not change between the listing and the end of the read.
        source: How the rows are written.
        group_by: `data.group_by`.

    Raises:
        DataError: A file has changed, is gone, or cannot be read at all.
    """
    for piece in part.pieces:
        check_unchanged(piece.file)
        for raw in piece.rows():
            yield _read(raw, source, group_by)
        check_unchanged(piece.file)


def scan_rows(source: RowSource, group_by: str | None = None) -> Iterator[Row | BadRow]:
    """Yield every row of a source in file order, including bad rows.

    Args:
        source: Where the rows are and how they are written.
        group_by: `data.group_by`.

    Raises:
        DataError: A file cannot be read at all, or the source has no rows.
    """
    is_empty = True
    for row in scan_part(whole(list_files(source), source.rows), source, group_by):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{shown_url(source.source)} holds no rows; expected one conversation or text a row")


def read_rows(source: RowSource, group_by: str | None = None) -> Iterator[Row]:
    """Yield the rows of a source in file order.

    Raises:
        DataError: See `scan_rows`; also for the first bad row, with its location.
    """
    for row in scan_rows(source, group_by):
        if isinstance(row, BadRow):
            raise row.error()
        yield row


def held_out_rows(data: DataConfig) -> Iterator[Row]:
    """Yield the held-out rows of all sources, one source after the other; none without held-out data.

    Raises:
        DataError: See `read_rows`; with `data.bad_rows: skip`, bad rows raise nothing.
    """
    if data.eval is None:
        return
    for source in data.eval_sources.values() or data.train:
        rows = scan_rows(source, data.group_by) if data.bad_rows == "skip" else read_rows(source, data.group_by)
        for row in rows:
            if isinstance(row, Row) and (data.eval_fraction is None or is_held_out(row, data.eval_fraction)):
                yield row


def with_placeholder(bad: BadRow, source: RowSource) -> Record | None:
    """Return the record of a row that lacks only its answer, with a mark in place of it; None of another bad row.

    Args:
        bad: The row.
        source: How its source is written.
    """
    if not isinstance(bad.raw, dict):
        return None
    names: Mapping[Any, str] = source.columns
    for asks, answers in _ASKING.items():
        asked, missing = bad.raw.get(names.get(asks, asks)), names.get(answers, answers)
        if not asked or (asks != answers and bad.raw.get(missing)):
            continue
        turn = {"from": "gpt", "value": "?"} if asks == "conversations" else {"role": "assistant", "content": "?"}
        filled: object = "?" if isinstance(asked, str) else [*(asked if asks == answers else []), turn]
        row = {**bad.raw, missing: filled}
        with suppress(DataError):
            return read_record(row, source.format, source.columns, source.ignore, source.prompt)
    return None


def is_held_out(row: Row, fraction: float) -> bool:
    """Return whether a row is held out. Its content decides, so all copies of a row are on the same side."""
    return row.key < int(fraction * 2**64)


def _read(raw: RawRow, source: RowSource, group_by: str | None) -> Row | BadRow:
    if raw.problem is not None:
        return BadRow(raw.location, raw.problem, raw.data)
    try:
        record = read_record(raw.data, source.format, source.columns, source.ignore, source.prompt)
        unread = unread_keys(raw.data, source.columns, [*source.ignore, *([group_by] if group_by else [])])
        if group_by is not None and raw.data.get(group_by) is None:
            raise DataError(f"has no `{group_by}`, which data.group_by names; add it to every row")
        key = _hash(record.split_content() if group_by is None else raw.data[group_by])
    except DataError as error:
        return BadRow(raw.location, str(error), raw.data)
    except RecursionError:
        return BadRow(raw.location, "nested too deeply", None)
    return Row(raw.location, record, key, raw.data, unread)


def _hash(value: Any) -> int:
    return int(xxhash.xxh3_64_intdigest(json.dumps(value, sort_keys=True, default=str).encode()))
