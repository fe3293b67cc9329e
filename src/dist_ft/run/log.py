"""Reads and writes the append-only JSONL files of a run; `events.py` has the entries of the ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from dist_ft.metric_rows import EvalRow, StepRow

Row = TypeVar("Row", StepRow, EvalRow)


class JsonlWriter:
    """Appends rows, one line each, flushed before `append` returns.

    Opening a file cuts off an incomplete last line, which a writer that died has left.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; a number that is not finite becomes null, because JSON has no such number."""
        self._file.write(json.dumps(_strict(row), separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; leaves out an incomplete last line, which a writer that died has left."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_steps(path: Path) -> dict[int, StepRow]:
    """Return the valid row of metrics.jsonl for each step: the last row of the newest attempt.

    Raises:
        ValueError: The file holds other rows.
    """
    return _newest(StepRow.from_dict(row) for row in read_lines(path))


def read_evals(path: Path) -> dict[int, EvalRow]:
    """Return the valid row of eval.jsonl for each step: the last row of the newest attempt.

    Raises:
        ValueError: The file holds other rows.
    """
    return _newest(EvalRow.from_dict(row) for row in read_lines(path))


def _newest(rows: Iterable[Row]) -> dict[int, Row]:
    """Return for each step the last row of the newest attempt."""
    found: dict[int, Row] = {}
    for row in rows:
        known = found.get(row.step)
        if known is None or row.attempt >= known.attempt:
            found[row.step] = row
    return found


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
