"""Reading rows of each kind of file: in order, with their places, a bad row never hiding the next."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from dist_ft.data.sources import readers
from dist_ft.data.sources.location import RawRow
from dist_ft.data.sources.readers import read_piece
from dist_ft.data.sources.source_file import EMBEDDED, SourceFile, kind_of
from dist_ft.errors import DataError
from dist_ft.file_kinds import FILE_KINDS, has_known_ending

ROWS = [{"q": f"a{n} ü,\n\"'", "a": str(n)} for n in range(600)]
"""More than one batch."""


def rows_of(path: Path) -> list[RawRow]:
    return list(read_piece(file_at(path)))


def file_at(path: Path) -> SourceFile:
    return SourceFile(str(path), *kind_of(str(path)), path.stat().st_size, "not hashed")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_wrapped(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps({"version": 1, "data": rows}, indent=1), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_gzip(path: Path, rows: list[dict[str, Any]]) -> None:
    plain = path.with_suffix("")
    WRITERS[plain.name](plain, rows)
    path.write_bytes(gzip.compress(plain.read_bytes()))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path, rows: list[dict[str, Any]]) -> None:
    feather.write_feather(pa.Table.from_pylist(rows), str(path))


WRITERS: Mapping[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "lines.json": write_jsonl,
    "a.json": write_json,
    "wrapped.json": write_wrapped,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "stream.arrow": write_arrow_stream,
    "a.feather": write_feather,
    "a.jsonl.gz": write_gzip,
    "a.json.gz": write_gzip,
    "lines.json.gz": write_gzip,
    "a.csv.gz": write_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    found = rows_of(tmp_path / name)
    assert [row.data for row in found] == ROWS
    assert not any(row.problem for row in found)
    by_line = "jsonl" in name or "lines" in name or "ndjson" in name
    places = [f"{tmp_path / name}:{n}" if by_line else f"{tmp_path / name}: row {n}" for n in (1, 600)]
    assert [str(found[0].location), str(found[-1].location)] == places


def test_every_kind_has_a_reader_and_every_reader_a_kind() -> None:
    assert {kind.name for kind in FILE_KINDS} | {EMBEDDED} == readers.READERS.keys()
    for kind in FILE_KINDS:
        for ending in kind.endings:
            assert kind_of(f"a{ending}") == (kind.name, None)
            assert has_known_ending(f"org/a{ending.upper()}")


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (row,) = rows_of(tmp_path / "a.txt")
    assert (str(row.location), row.data) == (f"{tmp_path}/a.txt: row 1", {"text": "one\n\ntwo\n"})


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_keys_that_other_rows_have_are_not_there(tmp_path: Path, name: str) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "content": "y", "name": "f"}]
    rows = [{"messages": turns, "tools": "[]"}, {"messages": turns[:1]}]
    WRITERS[name](tmp_path / name, rows)
    assert [row.data for row in rows_of(tmp_path / name)] == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_long_and_odd_text_is_kept(tmp_path: Path, name: str) -> None:
    rows = [{"q": "x" * 10_000_000, "a": "\x00\x1b[2J\u2028 \r\n"}, {"q": "next", "a": ""}]
    WRITERS[name](tmp_path / name, rows)
    assert [row.data for row in rows_of(tmp_path / name)] == rows


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("a.csv", b"q,a\n1\n1,2,3\n4,5\n", ["1 cells, but the header has 2", "3 cells, but the header has 2", None]),
        ("a.csv", b"q,a\n\xff,1\n2,3\n", ["not valid UTF-8", None]),
        ("a.txt", b"\xff", ["not valid UTF-8"]),
        ("a.jsonl", b'\xff\n{"a": 1, "a": 2}\n[]\n', ["not valid UTF-8", "key 'a' stands twice", None]),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 2}\n'.encode("utf-16"),
            ["UTF-16, which Windows", "NUL characters as UTF-16", "NUL"],
        ),
        ("a.txt", "text".encode("utf-16"), ["UTF-16, which Windows programs like to write; save the file as UTF-8"]),
    ],
)
def test_a_bad_row_is_given_with_its_problem(
    tmp_path: Path, name: str, content: bytes, problems: list[str | None]
) -> None:
    (tmp_path / name).write_bytes(content)
    found = [row.problem for row in rows_of(tmp_path / name)]
    for problem, says in zip(found, problems, strict=True):
        assert problem is None if says is None else says in str(problem)


def test_a_text_that_is_no_utf8_is_one_bad_row_of_a_parquet_file(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    pq.write_table(pa.table({"q": wrong}), tmp_path / "a.parquet")
    found = rows_of(tmp_path / "a.parquet")
    assert [row.data for row in found] == [{"q": "a"}, None, {"q": "c"}]
    assert found[1].problem == "not valid UTF-8"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", b"PAR1 and nothing", "a.parquet is not a sound parquet file"),
        ("a.arrow", b"nothing", "a.arrow is not a sound arrow file"),
        ("a.jsonl.gz", b"nothing", "a.jsonl.gz is damaged: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 1000, mtime=0)[:-10], "a.jsonl.gz is damaged"),
        ("a.json", b"[{]", "a.json:1: not valid JSON"),
        ("a.json", b'[\n{"a": 1},\n{"a": 2,}]', "a.json:3: not valid JSON"),
        ("a.json", b"5", "found int, expected an array of rows"),
        ("a.json", b'{"a": 1}', "found an object with 0 lists"),
        ("a.json", b'{"a": [], "b": []}', "found an object with 2 lists"),
        ("a.json", b"[" * 100_000, "a.json: not usable JSON"),
        ("a.csv", b"q,q\n1,2\n", "names a column twice"),
        ("a.csv", b'q,a\n"1"2,3\n', "a.csv:2: not valid CSV"),
        ("a.csv", b'q,a\n"1,3\n', "not valid CSV"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    assert says in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a.jsonl.lz4", "a.parquet.gz", "a.zst", "a.md", ".gz"])
def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"unknown kind of file; known endings are \.jsonl, "):
        kind_of(str(tmp_path / name))


@pytest.mark.parametrize(
    ("limit", "name", "advice"),
    [
        ("MAX_LINE_BYTES", "a.jsonl", "a row a line"),
        ("MAX_WHOLE_BYTES", "a.json", "convert it to JSONL"),
        ("MAX_TEXT_BYTES", "a.txt", "split it"),
    ],
)
def test_what_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str, advice: str
) -> None:
    (tmp_path / name).write_text(json.dumps([{"a": 1}] * 1000))
    monkeypatch.setattr(readers, limit, 1000)
    with pytest.raises(DataError, match=advice):
        rows_of(tmp_path / name)


def test_a_line_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q\n" + "x\n" * 10 + '"never ended')
    rows = read_piece(file_at(tmp_path / "a.csv"))
    assert [next(rows).data["q"] for _ in range(10)] == ["x"] * 10
