"""Cut files give exactly the rows of whole ones, wherever they are cut, with the same places."""

from __future__ import annotations

import json
import pickle
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import BadRow, Row, scan_part
from dist_ft.data.sources import readers as files_module
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.location import RawRow
from dist_ft.data.sources.parts import Part, Piece, cut_parts, whole
from dist_ft.data.sources.readers import read_piece
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.errors import DataError
from tests.unit.data.sources.test_readers import file_at

LINES = st.lists(st.sampled_from(["", " ", "ü", "😀" * 3, "x" * 40, "\x1b", '"', "]"]), max_size=12)


def rows_of(part: Part) -> list[RawRow]:
    return [row for piece in part.pieces for row in read_piece(piece.file, piece.start, piece.stop)]


def told(rows: list[RawRow]) -> list[tuple[str, Any, str | None]]:
    return [(str(row.location), row.data, row.problem) for row in rows]


def listed(path: Path, size: int, kind: str = "jsonl", **fields: Any) -> SourceFile:
    return SourceFile(str(path), kind, None, size, f"xxh3:{path.name}", **fields)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]), is_ended=st.booleans(), has_bom=st.booleans(), data=st.data())
def test_pieces_of_a_jsonl_file_give_its_rows_wherever_it_is_cut(
    lines: list[str], end: str, is_ended: bool, has_bom: bool, data: st.DataObject
) -> None:
    text = end.join([json.dumps({"text": line}, ensure_ascii=False) if line.strip() else line for line in lines])
    content = b"\xef\xbb\xbf" * has_bom + (text + end * is_ended).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        file = file_at(path)
        inner = data.draw(st.lists(st.integers(0, len(content)), max_size=6))
        edges = [0, *sorted(inner), len(content)]
        cut = Part(tuple(Piece(file, start, stop, 0) for start, stop in pairwise(edges)))
        assert told(rows_of(cut)) == told(rows_of(whole([file])))


@pytest.mark.parametrize("part_bytes", [1, 7, 50, 1000, 10**6])
def test_parts_of_a_source_give_its_rows(tmp_path: Path, part_bytes: int) -> None:
    for name in ("a", "b", "c"):
        rows = [{"text": f"{name} {n}"} for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken")
    source = RowSource(source=str(tmp_path))
    files = list_files(source)
    parts = cut_parts(files, part_bytes)
    assert cut_parts(files, part_bytes) == parts
    assert len({part.identity() for part in parts}) == len(parts)
    found = [row for part in parts for row in scan_part(part, source)]
    expected = list(scan_part(whole(files), source))
    assert [(row.place, type(row), row.raw) for row in found] == [(r.place, type(r), r.raw) for r in expected]
    assert sum(isinstance(row, Row) for row in found) == 60


def test_small_neighbours_share_a_part_and_large_files_are_cut(tmp_path: Path) -> None:
    sizes = [10, 20, 80, 30, 250, 5, 100, 0]
    parts = cut_parts([listed(tmp_path / f"{n}", size) for n, size in enumerate(sizes)], 100)
    cuts = [[(int(Path(p.file.address).name), p.start, p.stop) for p in part.pieces] for part in parts]
    assert cuts == [
        [(0, 0, None), (1, 0, None)],
        [(2, 0, None)],
        [(3, 0, None)],
        [(4, 0, 83)],
        [(4, 83, 166)],
        [(4, 166, 250), (5, 0, None)],
        [(6, 0, None), (7, 0, None)],
    ]


@pytest.mark.parametrize(
    "fields", [{"kind": "csv"}, {"kind": "json"}, {"kind": "text"}, {"has_ranges": False}], ids=str
)
def test_what_cannot_be_read_in_pieces_is_not_cut(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert len(cut_parts([listed(tmp_path / "a", 1000, **fields)], 100)) == 1


def write_groups(path: Path) -> None:
    table = pa.table({"q": [f"row {n}" for n in range(1000)]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=70, compression="none", use_dictionary=False)
        return
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("part_bytes", [1, 2500, 6000])
def test_columnar_files_are_cut_between_row_groups(tmp_path: Path, name: str, part_bytes: int) -> None:
    write_groups(tmp_path / name)
    file = file_at(tmp_path / name)
    parts = cut_parts([file], part_bytes)
    assert len(parts) > 2
    assert [piece.start for part in parts for piece in part.pieces] == sorted(
        {p.start for c in parts for p in c.pieces}
    )
    assert told([row for part in parts for row in rows_of(part)]) == told(rows_of(whole([file])))


def test_a_damaged_footer_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 100)
    with pytest.raises(DataError, match=r"a\.parquet is not a sound parquet file"):
        cut_parts([file_at(tmp_path / "a.parquet")], 100)


def test_lines_before_a_piece_are_counted_when_a_place_is_shown_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 100)
    counted: list[int] = []
    monkeypatch.setattr(files_module, "_count_lines", lambda file, stop: counted.append(stop) or stop // 14)
    rows = list(read_piece(file_at(tmp_path / "a.jsonl"), 700, 1400))
    assert counted == []
    assert [str(row.location).rpartition(":")[2] for row in rows] == [str(n) for n in range(51, 101)]
    assert counted == [700]


def test_a_row_far_behind_is_named_by_its_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAX_COUNTED_BYTES", 500)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 100)
    rows = list(read_piece(file_at(tmp_path / "a.jsonl"), 699, None))
    assert str(rows[1].location) == f"{tmp_path}/a.jsonl: byte 714"


def test_a_place_outlives_its_file_and_its_process(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 10)
    rows = list(read_piece(file_at(tmp_path / "a.jsonl"), 70, 140))
    assert str(pickle.loads(pickle.dumps(rows[0])).location) == f"{tmp_path}/a.jsonl:6"
    (tmp_path / "a.jsonl").unlink()
    assert str(rows[0].location) == f"{tmp_path}/a.jsonl: line 1 of a part"


def test_the_place_of_a_row_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\nbroken\n')
    source = RowSource(source=str(tmp_path / "a.jsonl"))
    good, bad = scan_part(whole(list_files(source)), source)
    assert json.dumps([good.place, bad.place]) == json.dumps([f"{tmp_path}/a.jsonl:{n}" for n in (1, 2)])
    assert isinstance(bad, BadRow)
    assert str(bad.error()).startswith(f"{tmp_path}/a.jsonl:2: not valid JSON")


def test_an_embedded_data_set_is_one_part() -> None:
    source = RowSource(source="embedded:orders/eval")
    (part,) = cut_parts(list_files(source), 1)
    assert len(list(scan_part(part, source))) == 200
