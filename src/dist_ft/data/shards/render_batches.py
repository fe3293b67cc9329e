"""Rows in batches for the renderer: many at once are tokenised faster, and few enough that memory stays flat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.errors import DataError
from dist_ft.printable import printable
from dist_ft.records import Completion, Record, Sample

_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4 << 20

RenderMany = Callable[[Sequence[Record]], list[list[Sample] | DataError]]
"""Of each record its samples, or what the template says against it."""
Rendered = tuple[Row | BadRow, list[Sample] | BadRow]


def render_rows(rows: Iterable[Row | BadRow], render_many: RenderMany) -> Iterator[Rendered]:
    """Yields every row in order with its samples, or with what is wrong with it."""
    for batch in _batches(rows):
        outcomes = iter(render_many([row.record for row in batch if isinstance(row, Row)]))
        for row in batch:
            yield row, row if isinstance(row, BadRow) else _outcome(row, next(outcomes))


def _outcome(row: Row, found: list[Sample] | DataError) -> list[Sample] | BadRow:
    return BadRow(row.where, printable(str(found)), row.raw) if isinstance(found, DataError) else found


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row.record) if isinstance(row, Row) else 0
        if len(batch) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(record: Record) -> int:
    """Returns about how long a record's text will be."""
    if isinstance(record, Completion):
        return len(record.prompt) + len(record.completion)
    return sum(len(message["content"]) for message in record.messages)
