"""Nobody outlives its lease: rank, supervisor and fork server, killed with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.orchestrate.workers.processes import Child, ForkServer, TaskRequest
from dist_ft.storage.store import LocalStore
from tests.helpers.cluster import command_line, is_alive
from tests.helpers.configs import tiny_config
from tests.helpers.group import run_group


def forked_from(starter: str) -> set[int]:
    """Pids of a fork server and its children, which share its command line."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if f"workers.forkserver\0{starter}".encode() in command_line(pid)}


def seconds_until(condition: Callable[[], bool], limit_s: float) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - began


def kill_rank_at(rank: int, step: int, number: int = signal.SIGKILL) -> Callable:
    def on_message(coordinator, envelope) -> None:
        body = envelope["body"]
        if envelope["kind"] == "step_done" and body["row"]["step"] == step:
            workers = {w.rank: w.pid for w in coordinator.status().record.workers}
            os.kill(workers[rank], number)

    return on_message


def test_a_killed_rank_is_named_and_the_resumed_run_ends_as_the_undisturbed_one(tmp_path: Path, starter: str) -> None:
    whole = run_group(tiny_config(tmp_path, run__name="whole", checkpoint__every_steps=2), starter)
    config = tiny_config(tmp_path, run__name="killed", checkpoint__every_steps=2)
    killed = run_group(config, starter, on_message=kill_rank_at(1, 5))
    assert killed.outcome == "failed"
    deaths = [f for f in killed.coordinator.status().failures if f.is_death]
    assert [f.rank for f in deaths] == [1]
    assert "killed by signal 9" in deaths[0].message
    resumed = run_group(config, starter)
    assert resumed.outcome == "completed"
    assert (resumed.losses, resumed.digests) == (whole.losses, whole.digests)
    last = [committed(LocalStore(g.run_dir.path))[-1] for g in (whole, resumed)]
    assert [f.xxh3 for f in last[0].files] == [f.xxh3 for f in last[1].files]


def test_a_supervisor_whose_rank_dies_ends_within_two_seconds(tmp_path: Path, starter: str) -> None:
    killed_at: list[float] = []
    kill = kill_rank_at(1, 3)

    def on_message(coordinator, envelope) -> None:
        if not killed_at:
            before = time.monotonic()
            kill(coordinator, envelope)
            if envelope["kind"] == "step_done" and envelope["body"]["row"]["step"] == 3:
                killed_at.append(before)

    group = run_group(tiny_config(tmp_path, train__max_steps=500), starter, on_message=on_message)
    assert group.outcome == "failed"
    assert group.ended_at[1] - killed_at[0] < 2.0


def test_a_rank_whose_supervisor_dies_ends_within_two_seconds(tmp_path: Path, starter: str) -> None:
    # The supervisor is a process of its own here, holding the lease of a rank that waits for its peer.
    code = f"""
import sys, time
from tests.helpers.configs import tiny_config
from pathlib import Path
from dist_ft.orchestrate.workers.processes import Child
from dist_ft.orchestrate.workers.supervisor import RankSlot, make_rank_spec
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.run_inputs import RunInputs
from tests.helpers.manifests import MARK
config = tiny_config(Path({str(tmp_path)!r}))
run = {str(tmp_path / "run")!r}
attempt = AttemptSpec("t", 1, run, config, RunInputs((), None, MARK, 1, 1))
spec = make_rank_spec(attempt, RankSlot(0, 2, 0, 2, "127.0.0.1"))
child = Child({starter!r}, spec)
while True:
    for message in child.receive(0.1):
        if message["kind"] == "rank_started":
            print(message["body"]["pid"], flush=True)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert supervisor.stdout is not None
    rank = int(supervisor.stdout.readline())
    assert is_alive(rank)
    supervisor.kill()
    supervisor.wait()
    assert seconds_until(lambda: not is_alive(rank), 2.0) < 2.0


@pytest.mark.parametrize("is_killed", [False, True], ids=["the client lets go", "the client is killed"])
def test_a_child_that_is_stopped_ends_with_its_client(is_killed: bool, starter: str) -> None:
    code = f"""
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({starter!r})  # the child waits for what it is to do
sys.stdin.readline()
connection.close()
sys.stdin.readline()
"""
    seconds_until(lambda: bool(forked_from(starter)), 60.0)  # the server itself, which may be about to start
    before = forked_from(starter)
    client = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert client.stdin is not None
    seconds_until(lambda: bool(forked_from(starter) - before), 60.0)
    (pid,) = forked_from(starter) - before
    os.kill(pid, signal.SIGSTOP)
    if is_killed:
        client.kill()
    else:
        client.stdin.write("\n")
        client.stdin.flush()
    assert seconds_until(lambda: not is_alive(pid), 2.0) < 2.0
    client.kill()
    client.communicate()


def test_a_dead_child_is_seen_at_once_with_its_signal(starter: str, tmp_path: Path) -> None:
    child = Child(starter, TaskRequest("prepare", {"config": {}}))
    while not child.is_closed:
        child.receive(0.5)
    assert child.exit_status == 1
    child.close()


def test_the_fork_server_ends_with_its_owner() -> None:
    code = """
import time
from dist_ft.orchestrate.workers.processes import ForkServer
server = ForkServer()
print(server.pid, flush=True)
time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    # It may be in the middle of its imports, and looks at its lease after them.
    seconds_until(lambda: not is_alive(pid), 60.0)


def test_children_of_a_dead_fork_server_finish_their_work(tmp_path: Path) -> None:
    server = ForkServer()
    config = tiny_config(tmp_path)

    def kill_server(coordinator, envelope) -> None:
        if envelope["kind"] == "step_done" and envelope["body"]["row"]["step"] == 1:
            os.kill(server.pid, signal.SIGKILL)

    group = run_group(config, server.socket_path, on_message=kill_server)
    server.close()
    assert group.outcome == "completed"
    assert len(group.losses) == 6


def test_no_process_holds_both_ray_and_torch(starter: str, tmp_path: Path) -> None:
    found: list[str] = []

    def look(coordinator, envelope) -> None:
        if envelope["kind"] == "step_done" and not found:
            for worker in coordinator.status().record.workers:
                maps = Path(f"/proc/{worker.pid}/maps").read_text()
                found.append("ray" if "/ray/_raylet" in maps else "")
                assert "libtorch" in maps

    run_group(tiny_config(tmp_path), starter, on_message=look)
    assert found == ["", ""]
