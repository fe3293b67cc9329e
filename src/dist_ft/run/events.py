"""The append-only record of a run: attempts, commits, decisions, failures with cause."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dist_ft.run.log import JsonlWriter


class Ledger:
    """Writes ledger.jsonl and keeps this process's entries for the console."""

    def __init__(self, path: Path) -> None:
        self._writer = JsonlWriter(path)
        self.entries: list[dict[str, Any]] = []

    def add(self, event: str, **facts: Any) -> None:
        """Appends an entry."""
        entry = {"time": round(time.time(), 3), "event": event, **facts}
        self._writer.append(entry)
        self.entries.append(entry)

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
