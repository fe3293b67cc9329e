"""Makes a live view of a run from its files alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dist_ft.metric_rows import StepRow
from dist_ft.run.place import Run
from dist_ft.run.state import FINAL
from dist_ft.run.status import read_status, render_status

_TAIL_BYTES = 4096


def view(run: Run) -> tuple[str, bool]:
    """Return the run's status with its newest numbers, and whether it has ended.

    Raises:
        UsageError: No run exists at that path.
    """
    status = read_status(run)
    run.fetch("metrics.jsonl")
    row = newest_row(run.metrics)
    text = render_status(status)
    if row is not None:
        loss = "left out" if row.loss is None else f"{row.loss:.4f}"
        text += f"\n  newest step  {row.step:,}  loss {loss}  lr {row.lr:.2e}  {row.tokens_per_s:,.0f} tokens/s"
    return text, status.record.state in FINAL


def newest_row(path: Path) -> StepRow | None:
    """Return the last complete row of metrics.jsonl, reading only its end; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        *whole, _ = file.read().split(b"\n")  # after the last line break: nothing, or an incomplete row
    try:
        return StepRow.from_dict(json.loads(whole[-1])) if whole else None
    except ValueError:
        return None
