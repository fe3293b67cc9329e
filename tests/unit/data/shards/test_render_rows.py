"""Rows in batches: every row once and in order, however they are grouped."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dist_ft.data.rows.scan import BadRow, Row
from dist_ft.data.shards import make
from dist_ft.data.shards.make import render_rows
from dist_ft.data.sources.location import RowLocation
from dist_ft.errors import DataError
from dist_ft.records import Completion, Conversation, Record, Sample


def row(number: int) -> Row | BadRow:
    where = RowLocation("a.jsonl", number, "line")
    if number % 5 == 0:
        return BadRow(where, "not valid JSON", "x")
    record: Record = Completion("", "x" * number)
    if number % 2:
        record = Conversation([{"role": "assistant", "content": "x" * number}])
    return Row(where, record, 0, {"number": number})


class Renders:
    """Refuses every seventh length, and notes how many records come at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, records: Sequence[Record]) -> list[list[Sample] | DataError]:
        self.sizes.append(len(records))
        return [self._one(record) for record in records]

    def _one(self, record: Record) -> list[Sample] | DataError:
        length = len(record.completion if isinstance(record, Completion) else record.messages[0]["content"])
        return DataError("refused\x1b") if length % 7 == 0 else [Sample([length], [True])]


@pytest.mark.parametrize(
    ("rows_at_once", "characters", "largest"), [(1, 10**6, 1), (4, 10**6, 4), (100, 50, 9), (100, 1, 1)]
)
def test_every_row_comes_once_with_its_outcome(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, characters: int, largest: int
) -> None:
    monkeypatch.setattr(make, "_BATCH_ROWS", rows_at_once)
    monkeypatch.setattr(make, "_BATCH_CHARACTERS", characters)
    rows = [row(number) for number in range(1, 60)]
    render = Renders()
    found = list(render_rows(rows, render))
    assert [given for given, _ in found] == rows
    assert max(render.sizes) == largest
    for number, (given, outcome) in enumerate(found, start=1):
        if number % 5 == 0:
            assert outcome is given
        elif number % 7 == 0:
            assert isinstance(outcome, BadRow)
            assert str(outcome.error()) == f"a.jsonl:{number}: refused\\x1b"
        else:
            assert outcome == [Sample([number], [True])]


def test_rows_are_read_only_as_far_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "_BATCH_ROWS", 3)
    read: list[int] = []
    rows = (read.append(number) or row(number) for number in range(1, 100))
    next(render_rows(rows, Renders()))
    assert read == [1, 2, 3]
