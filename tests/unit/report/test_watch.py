"""The newest numbers of a run that is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft.layout import RunDir
from dist_ft.report.watch import newest_row, view
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
