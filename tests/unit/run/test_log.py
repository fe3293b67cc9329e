"""Append-only row files: whole after any death of a writer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft.metric_rows import EvalRow
from dist_ft.run.log import JsonlWriter, read_evals, read_lines, read_steps
from tests.helpers.rows import step_row

ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "text": "größer\nals 😀"}]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    writer = JsonlWriter(path)
    for row in rows:
        writer.append(row)
    writer.close()


def test_rows_read_back(tmp_path: Path) -> None:
    _write(tmp_path / "logs/a.jsonl", ROWS)
    assert read_lines(tmp_path / "logs/a.jsonl") == ROWS
    assert (tmp_path / "logs/a.jsonl").read_text().count("\n") == 2


def test_a_row_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.append(ROWS[0])
    assert read_lines(tmp_path / "a.jsonl") == ROWS[:1]
    writer.close()


def test_a_file_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", ROWS[:1])
    _write(tmp_path / "a.jsonl", ROWS[1:])
    assert read_lines(tmp_path / "a.jsonl") == ROWS


def test_wherever_a_writer_died_the_next_one_goes_on_after_the_last_whole_row(tmp_path: Path) -> None:
    _write(tmp_path / "whole.jsonl", ROWS)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for size in range(len(whole) + 1):
        path = tmp_path / "a.jsonl"
        path.write_bytes(whole[:size])
        survived = whole[:size].count(b"\n")
        _write(path, [{"step": 9}])
        assert read_lines(path) == [*ROWS[:survived], {"step": 9}]


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
    assert read_lines(tmp_path / "a.jsonl") == [{"step": 1}]


def test_missing_rows_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert read_lines(path) == []
    assert read_steps(path) == {}
    assert read_evals(path) == {}


STEPS = [step_row(1, 1), step_row(2, 1), step_row(2, 2), step_row(3, 2, loss=None), step_row(1, 1, loss=0.5)]


def test_the_last_row_of_the_newest_attempt_counts(tmp_path: Path) -> None:
    _write(tmp_path / "metrics.jsonl", [row.to_dict() for row in [*STEPS, step_row(3, 1)]])
    assert read_steps(tmp_path / "metrics.jsonl") == {1: STEPS[4], 2: STEPS[2], 3: STEPS[3]}


@pytest.mark.parametrize("kept", range(1, len(json.dumps(STEPS[2].to_dict()))))
def test_a_torn_last_row_is_left_out(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row.to_dict()) for row in STEPS[:3]]
    path.write_text("\n".join([*lines[:2], lines[2][:kept]]))
    assert read_steps(path) == {1: STEPS[0], 2: STEPS[1]}


def test_a_number_that_is_not_finite_is_null_in_the_file_and_none_for_readers(tmp_path: Path) -> None:
    row = step_row(1, loss=float("inf"), goodput=0.5, metrics={"margin": 0.25})
    _write(tmp_path / "metrics.jsonl", [row.to_dict()])
    _write(tmp_path / "eval.jsonl", [EvalRow(0, 0, {"eval_loss": float("nan"), "bleu": 0.5}).to_dict()])
    assert read_steps(tmp_path / "metrics.jsonl") == {1: replace(row, loss=None)}
    assert read_evals(tmp_path / "eval.jsonl") == {0: EvalRow(0, 0, {"eval_loss": None, "bleu": 0.5})}


def test_rows_stand_in_the_file_under_the_documented_keys() -> None:
    assert list(step_row(1, goodput=0.5).to_dict()) == [
        "step", "attempt", "world_size", "epoch", "position", "loss", "lr", "grad_norm", "trained_tokens", "tokens",
        "tokens_per_s", "step_s", "data_s", "digest", "goodput",
    ]  # fmt: skip
    assert list(EvalRow(0, 1, {"eval_loss": 1.0}).to_dict()) == ["step", "attempt", "eval_loss"]


def test_a_row_that_lacks_something_is_refused_by_name(tmp_path: Path) -> None:
    row = step_row(1).to_dict()
    del row["loss"], row["digest"]
    _write(tmp_path / "metrics.jsonl", [row])
    with pytest.raises(ValueError, match="a row without loss, digest"):
        read_steps(tmp_path / "metrics.jsonl")
