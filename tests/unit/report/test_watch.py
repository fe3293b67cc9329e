"""The newest numbers of a run that is being written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft.report.watch import newest_row


@pytest.mark.parametrize("torn", [b"", b'{"step": 4, "lo'])
def test_the_newest_row_is_the_last_whole_one(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps({"step": step, "pad": "x" * 3000}) + "\n" for step in (1, 2, 3))
    path.write_bytes(rows.encode() + torn)
    row = newest_row(path)
    assert row is not None
    assert row["step"] == 3


@pytest.mark.parametrize("content", [None, b"", b'{"step": 1'])
def test_there_is_none_before_the_first_step(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert newest_row(path) is None
