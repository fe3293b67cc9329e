"""Append-only JSONL files of a run: metrics, evaluations, ledger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


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
