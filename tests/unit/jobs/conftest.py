"""Sources for tasks to work on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes lines as a source, and returns its path."""

    def write_file(*lines: str, name: str = "a.jsonl") -> str:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(tmp_path / name)

    return write_file
