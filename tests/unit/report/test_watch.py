"""The newest numbers of a run that is being written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dist_ft.layout import RunDir
from dist_ft.report.watch import live_view, newest_row, sparkline, view
from dist_ft.run.place import open_run
from dist_ft.storage.publish import write_json
from tests.helpers.rows import step_row


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo'])
def test_the_newest_row_is_the_last_whole_one(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps(step_row(step, digest="x" * 3000).to_dict()) + "\n" for step in (1, 2, 3))
    path.write_bytes(rows.encode() + torn)
    row = newest_row(path)
    assert row is not None
    assert row.step == 3


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1'])
def test_there_is_none_before_the_first_step(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert newest_row(path) is None


def test_a_step_that_was_left_out_is_shown(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    write_json(
        run_dir.run_json,
        {
            "run_id": "r", "state": "running", "attempt": 2, "step": 3, "max_steps": 4, "world_size": 1, "workers": [],
            "sink_ids": {}, "goodput": 0.5,
        },
    )  # fmt: skip
    row = step_row(3, 2, loss=None, grad_norm=None, tokens_per_s=0.0, step_s=0.0)
    run_dir.metrics.write_text(json.dumps(row.to_dict()) + "\n")
    text, is_ended = view(open_run(tmp_path))
    assert "newest step  3  loss left out  lr 1.00e-04" in text
    assert not is_ended


def shown(run_dir: RunDir) -> tuple[str, bool]:
    view_now, has_ended = live_view(open_run(run_dir.path))
    console = Console(width=110, record=True, file=io.StringIO(), color_system=None)
    console.print(view_now)
    return console.export_text(), has_ended


def test_the_live_view_shows_progress_curves_workers_and_the_story(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    workers = [{"rank": rank, "pid": 1, "node_ip": f"10.0.0.{1 + rank // 2}"} for rank in range(4)]
    record = {
        "run_id": "r", "state": "running", "attempt": 2, "step": 30, "max_steps": 60, "world_size": 4,
        "workers": workers, "sink_ids": {}, "goodput": 0.5,
    }  # fmt: skip
    write_json(run_dir.run_json, record)
    text, _ = shown(run_dir)  # before the first step
    assert "step 30 of 60" in text
    rows = [step_row(step, loss=3.0 - step / 20, step_s=2.0) for step in range(1, 31)]
    run_dir.metrics.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    run_dir.evals.write_text('{"step": 30, "attempt": 1, "eval_loss": 1.75, "orders/eval_loss": 1.25}\n')
    ledger = [{"time": 0.0, "event": "commit", "attempt": 1, "step": step} for step in range(1, 31)]
    ledger.append({"time": 1.0, "event": "\x1b[2Jhostile", "attempt": 1})
    run_dir.ledger.write_text("".join(json.dumps(row) + "\n" for row in ledger))
    text, has_ended = shown(run_dir)
    for said in (
        "ETA 1m00s",
        "1.5000",
        "1.7500",
        "orders",
        "1.2500",
        "10.0.0.1: rank 0-1",
        "10.0.0.2: rank 2-3",
        "checkpoint at step 30",
    ):
        assert said in text, said
    assert "checkpoint at step 22" not in text  # the tail of the story only
    assert "\x1b" not in text
    assert not has_ended
    write_json(run_dir.run_json, {**record, "state": "failed", "error": {"type": "E", "message": "no room"}})
    text, has_ended = shown(run_dir)
    assert ("E: no room" in text, has_ended) == (True, True)


def test_a_sparkline_is_as_high_as_its_numbers() -> None:
    assert sparkline([0.0, 7.0, 3.5, float("nan")]) == "▁█▅"
    assert sparkline([1.0] * 3) == "▁▁▁"
    assert len(sparkline([float(n) for n in range(1000)], 48)) <= 48
    assert sparkline([]) == ""
