"""What a client asks of a child, as one line of JSON, and what it learns of a server that cannot start."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from dist_ft.errors import WorkerCrashError
from dist_ft.machine import OWN_PYTHON
from dist_ft.orchestrate.workers.processes import ForkServer, TaskRequest, decode_request, encode_request, run_task
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from tests.helpers.paths import ROOT
from tests.helpers.simulated_run import INPUTS, run_config

ATTEMPT = AttemptSpec("r", 1, "/runs/r", run_config(), INPUTS)


@pytest.mark.parametrize(
    "request_",
    [
        RankSpec(ATTEMPT, 0, 2, 0, "127.0.0.1", num_threads=1, env={"CUDA_VISIBLE_DEVICES": "0"}),
        TaskRequest("prepare", {"config": {"entry": "rank"}}, {"CUDA_VISIBLE_DEVICES": "1"}),
        TaskRequest("export", {}),
    ],
    ids=lambda request: type(request).__name__,
)
def test_a_request_survives_the_way_to_the_child(request_: RankSpec | TaskRequest) -> None:
    line = encode_request(request_)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert decode_request(line) == request_


def test_a_server_that_dies_while_it_imports_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer()
    try:
        with pytest.raises(WorkerCrashError, match=r"(?s)last lines that it printed:.*\n  OSError: libcudart\.so\.12"):
            run_task(server.socket_path, "prepare", {})
    finally:
        server.close()
    assert not server.directory.exists()


def test_the_directory_of_a_server_that_is_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver makes it current while Ray starts, and the preparation may replace the server at any moment."""
    (tmp_path / "torch.py").write_text("raise OSError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    server = ForkServer()
    try:
        first = server.socket_path
        with contextlib.chdir(server.directory):
            server.restart()
            assert Path.cwd() == server.directory
        assert server.socket_path != first
        with pytest.raises(WorkerCrashError, match="broken"):
            run_task(server.socket_path, "prepare", {})
    finally:
        server.close()
    assert not server.directory.exists()


def test_no_module_of_the_current_directory_takes_the_place_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("x = 1")
    done = subprocess.run([*OWN_PYTHON, "-c", "import random; random.random()"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    others = [path.name for path in (ROOT / "src").rglob("*.py") if "[sys.executable" in path.read_text()]
    assert others == [], "processes of dist-ft are started with OWN_PYTHON"
