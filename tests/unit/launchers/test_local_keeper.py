"""Tests of the keeper as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from dist_ft.launchers.local_keeper import PROCESSES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_cannot_be_recorded_does_not_go_on_unseen(tmp_path: Path) -> None:
    (tmp_path / PROCESSES).mkdir()  # so the record cannot be written
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", "import time; time.sleep(600)", mark]
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft.launchers.local_keeper", str(tmp_path), *command], check=False, timeout=60
    )
    left = [int(entry.parent.name) for entry in Path("/proc").glob("[0-9]*/cmdline") if mark in _text(entry)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert (done.returncode, left) == (1, [])


def _text(entry: Path) -> str:
    try:
        return entry.read_text(errors="replace")
    except OSError:  # it has ended
        return ""
