"""Append-only row files: whole after any death of a writer."""

from __future__ import annotations

from pathlib import Path

from dist_ft.layout import last_rows, read_rows
from dist_ft.run.log import JsonlWriter

ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "text": "größer\nals 😀"}]


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    writer = JsonlWriter(path)
    for row in rows:
        writer.append(row)
    writer.close()


def test_rows_read_back(tmp_path: Path) -> None:
    _write(tmp_path / "logs/a.jsonl", ROWS)
    assert read_rows(tmp_path / "logs/a.jsonl") == ROWS
    assert (tmp_path / "logs/a.jsonl").read_text().count("\n") == 2


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.append(ROWS[0])
    assert read_rows(tmp_path / "a.jsonl") == ROWS[:1]
    writer.close()


def test_a_file_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", ROWS[:1])
    _write(tmp_path / "a.jsonl", ROWS[1:])
    assert read_rows(tmp_path / "a.jsonl") == ROWS


def test_wherever_a_writer_died_the_next_one_goes_on_after_the_last_whole_row(tmp_path: Path) -> None:
    _write(tmp_path / "whole.jsonl", ROWS)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for size in range(len(whole) + 1):
        path = tmp_path / "a.jsonl"
        path.write_bytes(whole[:size])
        survived = whole[:size].count(b"\n")
        _write(path, [{"step": 9}])
        assert read_rows(path) == [*ROWS[:survived], {"step": 9}]


def test_opening_alone_changes_only_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for data, expected in [
        (b"", b""),
        (b'{"a":1}\n', b'{"a":1}\n'),
        (b'{"a":1}\n{"b', b'{"a":1}\n'),
        (b'{"b', b""),
    ]:
        path.write_bytes(data)
        JsonlWriter(path).close()
        assert path.read_bytes() == expected


def test_a_reader_leaves_out_a_torn_last_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_rows(tmp_path / "a.jsonl") == [{"step": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_the_last_row_of_a_step_counts(tmp_path: Path) -> None:
    _write(
        tmp_path / "a.jsonl",
        [{"step": 1, "attempt": 1}, {"step": 2, "attempt": 1}, {"step": 1, "attempt": 2}],
    )
    assert {step: row["attempt"] for step, row in last_rows(tmp_path / "a.jsonl").items()} == {1: 2, 2: 1}
