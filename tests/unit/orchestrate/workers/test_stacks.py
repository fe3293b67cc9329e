"""Where a rank is, read from real stacks of a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.orchestrate.workers.stacks import dump_stacks, is_in_collective

_PROCESS = """
import threading, time
from dist_ft.orchestrate.workers.stacks import answer_to_dump_signal
answer_to_dump_signal()
exec(compile("def all_reduce(): print('ready', flush=True); time.sleep(1e6)", {file!r}, "exec"))
def wrapper(): all_reduce()
threading.Thread(target=threading.Event().wait, daemon=True).start()
wrapper()
"""


@pytest.mark.parametrize(
    ("file", "state"),
    [
        ("/site-packages/torch/distributed/distributed_c10d.py", "waits"),
        ("/site-packages/torch/nn/modules/linear.py", "works"),
    ],
)
def test_a_rank_inside_a_collective_waits_and_another_works(file: str, state: str, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS.format(file=file)], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert dump_stacks(process.pid, tmp_path / "log", tmp_path / "stacks" / "rank") == state
        written = (tmp_path / "stacks" / "rank").read_text()
        assert file in written
        assert is_in_collective(written) == (state == "waits")
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert dump_stacks(process.pid, tmp_path / "log", tmp_path / "stacks" / "rank") == "stopped"
        assert "State:\tT (stopped)" in (tmp_path / "stacks" / "rank").read_text()
    finally:
        process.kill()
        process.wait()


def test_a_process_that_is_gone_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    process = subprocess.Popen(["true"])
    process.wait()
    assert dump_stacks(process.pid, tmp_path / "log", tmp_path / "rank") == "works"
    assert not (tmp_path / "rank").exists()
