"""Tests of the start of a local run, with the keeper as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_ft.errors import DistFtError
from dist_ft.launchers.local import LocalLauncher
from dist_ft.launchers.local_keeper import PROCESSES
from tests.helpers.configs import tiny_config


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


def test_a_machine_that_is_too_busy_to_start_a_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", too_slow)
    request: Any = SimpleNamespace(load_checked=lambda: tiny_config(tmp_path), train_options=[])
    with pytest.raises(DistFtError, match="not started within 60 s; `dist-ft status local:"):
        LocalLauncher(tmp_path / "jobs").submit(request)
