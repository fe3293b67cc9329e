"""The append-only JSONL files of a run: metrics.jsonl and eval.jsonl here, the ledger in `events.py`."""

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

    A torn last line, left by a writer that died, is cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._file = path.open("ab")

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row; a number that is not finite becomes null, which is what JSON has for it."""
        self._file.write(json.dumps(_strict(row), separators=(",", ":"), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSONL file; leaves out a torn last line, which a writer that died left."""
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
    """Returns the row of metrics.jsonl that counts for each step.

    Raises:
        ValueError: The file holds other rows.
    """
    return _newest(StepRow.from_dict(row) for row in read_lines(path))


def read_evals(path: Path) -> dict[int, EvalRow]:
    """Returns the row of eval.jsonl that counts for each step.

    Raises:
        ValueError: The file holds other rows.
    """
    return _newest(EvalRow.from_dict(row) for row in read_lines(path))


def _newest(rows: Iterable[Row]) -> dict[int, Row]:
    """Keeps for each step the row of the newest attempt, and of these the last."""
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
