"""The row files of a run as anybody may read them, and rows for tests to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_ft.metric_rows import StepRow


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a JSONL file without a torn last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def last_rows(path: Path) -> dict[int, dict[str, Any]]:
    """Returns the row of each step that counts: the newest attempt's, and of these the last."""
    rows = sorted(read_rows(path), key=lambda row: row["attempt"])
    return {row["step"]: row for row in rows}


def step_row(step: int, attempt: int = 1, **changes: Any) -> StepRow:
    """Returns a row of metrics.jsonl."""
    numbers: dict[str, Any] = {
        "world_size": 2, "epoch": 0, "position": 8 * step, "loss": 1.25, "lr": 1e-4, "grad_norm": 0.5,
        "trained_tokens": 60, "tokens": 99, "tokens_per_s": 495.0, "step_s": 0.2, "data_s": 0.01, "digest": "00ff",
    }  # fmt: skip
    return StepRow(step=step, attempt=attempt, **{**numbers, **changes})
