"""`data.train[].rows`: which rows of a source are used, in every kind of file and over several files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from dist_ft.config.data_sections import RowBound, RowSource
from dist_ft.data.rows.scan import read_rows
from dist_ft.data.shards.request import SplitRequest, plan_split, rows_of_split
from dist_ft.errors import DataError
from dist_ft.records import Completion


def _folder(tmp_path: Path, ending: str) -> Path:
    """Two files with rows 0 to 5 and 6 to 9."""
    folder = tmp_path / ending
    folder.mkdir()
    for name, numbers in (("a", range(6)), ("b", range(6, 10))):
        rows = [{"text": f"row {number}"} for number in numbers]
        path = folder / f"{name}.{ending}"
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        elif ending == "json":
            path.write_text(json.dumps(rows))
        elif ending == "csv":
            path.write_text("text\n" + "".join(f"{row['text']}\n" for row in rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _numbers(source: RowSource) -> list[int]:
    records = [row.record for row in read_rows(source)]
    return [int(record.completion.split()[1]) for record in records if isinstance(record, Completion)]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0, 3], range(3)),
        ([4, 8], range(4, 8)),
        ([7, None], range(7, 10)),
        ([8, 99], range(8, 10)),
        (["0%", "25%"], range(2)),  # 2.5 rounds to 2, as in `datasets`
        (["50%", "100%"], range(5, 10)),
        ([2, "40%"], range(2, 4)),
    ],
)
def test_a_range_of_rows_is_read(ending: str, rows: list[RowBound], expected: range, tmp_path: Path) -> None:
    source = RowSource(source=str(_folder(tmp_path, ending)), rows=rows)
    assert _numbers(source) == list(expected)
    plan = plan_split(SplitRequest((source,), seq_len=8, packing=False, render_key="", part_bytes=16))
    assert [row.place for row in rows_of_split(plan)] == [row.place for row in read_rows(source)]


def test_another_range_gives_other_shards_and_all_rows_the_same_as_none(tmp_path: Path) -> None:
    folder = str(_folder(tmp_path, "jsonl"))

    def key(rows: list[RowBound] | None) -> str:
        source = RowSource(source=folder, rows=rows)
        return plan_split(SplitRequest((source,), seq_len=8, packing=False, render_key="")).key

    assert len({key(None), key([0, 3]), key([0, 4]), key([1, 4])}) == 4


def test_no_row_behind_the_range_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "row 0"}\n{"text": "row 1"}\nbroken\n')
    assert _numbers(RowSource(source=str(path), rows=[0, 2])) == [0, 1]


@pytest.mark.parametrize("rows", [[10, 20], [3, 3], ["0%", "1%"], ["90%", "10%"]])
def test_a_range_without_rows_is_an_error(rows: list[RowBound], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none of the"):
        list(read_rows(RowSource(source=str(_folder(tmp_path, "jsonl")), rows=rows)))


@pytest.mark.parametrize("rows", [[1], [-1, 3], ["1", "2"], ["0%", "101%"], "0:3"])
def test_what_is_no_range_is_refused(rows: object) -> None:
    with pytest.raises(ValidationError):
        RowSource(source="a.jsonl", rows=rows)  # type: ignore[arg-type]
