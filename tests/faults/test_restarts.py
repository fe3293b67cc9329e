"""A group that loses a rank, a worker or a node is formed again, and the result is that of an undisturbed run.

Real processes, real signals, a real Ray. What a restart costs is measured elsewhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cluster import AddedNode, LoopbackCluster, command_line, descendants
from tests.helpers.runs import Run

STEPS = 60
SETTINGS = (
    "train.max_steps=60",
    "optimizer.lr=1e-3",
    "checkpoint.every_steps=5",
    "cluster.num_workers=2",
    "failure.backoff_s=0.1",
)


@pytest.fixture(scope="module")
def undisturbed(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Run:
    run = Run(cli, tmp_path_factory.mktemp("undisturbed"), ray_address, "whole", *SETTINGS)
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 1), err
    return run


def _kill(rank: int, signal_number: int = signal.SIGKILL) -> Callable[[dict[str, Any], int], None]:
    return lambda record, ray_pid: os.kill(record["workers"][rank]["pid"], signal_number)


def _kill_supervisor(record: dict[str, Any], ray_pid: int) -> None:
    os.kill(next(pid for pid in descendants(ray_pid) if b"RayTrainWorker" in command_line(pid)), signal.SIGKILL)


FAULTS: dict[str, Callable[[dict[str, Any], int], None]] = {
    "SIGKILL of rank 0": _kill(0),
    "SIGKILL of rank 1": _kill(1),
    "SIGKILL of a supervisor": _kill_supervisor,
    "SIGSTOP of rank 1": _kill(1, signal.SIGSTOP),
}


@pytest.mark.parametrize(
    "fault",
    [
        "SIGKILL of rank 0",
        pytest.param("SIGKILL of rank 1", marks=pytest.mark.faults),
        pytest.param("SIGKILL of a supervisor", marks=pytest.mark.faults),
        "SIGSTOP of rank 1",
    ],
)
def test_a_fault_leaves_no_trace_in_the_result(
    fault: str, cli: str, tmp_path: Path, session_ray: tuple[str, int], undisturbed: Run
) -> None:
    address, ray_pid = session_ray
    run = Run(cli, tmp_path, address, "hurt", *SETTINGS, "failure.limits.step_s=4")
    FAULTS[fault](run.wait_for(lambda record: record["step"] >= 8), ray_pid)
    code, result, err = run.finish()
    assert (code, result["state"], result["attempts"]) == (0, "completed", 2), err
    assert "recovering after step" in err
    assert fault != "SIGSTOP of rank 1" or "rank 1 makes no progress in phase step" in err
    assert len(run.events("recovering")) == 1
    _check_equal(run, undisturbed)
    lost = run.events("recovering")[0]["step"] - run.events("attempt")[1]["start_step"]
    assert 0 <= lost <= 5 + 1  # the interval, and a checkpoint that was being written


@pytest.mark.faults
def test_two_faults_in_a_row_are_survived(cli: str, tmp_path: Path, ray_address: str, undisturbed: Run) -> None:
    run = Run(cli, tmp_path, ray_address, "twice", *SETTINGS)
    first = run.wait_for(lambda record: record["step"] >= 8)
    os.kill(first["workers"][0]["pid"], signal.SIGKILL)
    pids = {worker["pid"] for worker in first["workers"]}
    second = run.wait_for(lambda r: len(r["workers"]) == 2 and not pids & {worker["pid"] for worker in r["workers"]})
    os.kill(second["workers"][1]["pid"], signal.SIGKILL)  # while it loads
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 3), err
    _check_equal(run, undisturbed)


@pytest.mark.faults
def test_a_run_starts_though_its_fork_server_dies_meanwhile(
    cli: str, tmp_path: Path, ray_address: str, undisturbed: Run
) -> None:
    run = Run(cli, tmp_path, ray_address, "start", *SETTINGS)
    connections = Path("/proc/net/unix")
    while True:
        assert run.process.poll() is None, run.process.communicate()
        found = [p for p in descendants(run.process.pid) if b"workers.forkserver" in command_line(p)]
        socket = command_line(found[0]).decode().split("\0")[-2] if found else ""
        if socket and connections.read_text().count(socket) >= 2:  # it listens, and the preparation waits in line
            break
    os.kill(found[0], signal.SIGKILL)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), err
    _check_equal(run, undisturbed)


def test_numbers_that_are_not_finite_are_not_tried_again(cli: str, tmp_path: Path, ray_address: str) -> None:
    run = Run(cli, tmp_path, ray_address, "diverged", *SETTINGS, "optimizer.lr=1e30", "optimizer.max_grad_norm=0")
    code, result, err = run.finish()
    assert (code, result["state"], result["attempts"]) == (1, "failed", 1)
    assert result["error"]["type"] == "DivergedError"
    assert "giving up" in err
    assert "failure.bad_numbers" in err


def test_a_run_goes_on_with_fewer_workers_when_a_node_is_lost(
    cli: str, tmp_path: Path, two_nodes: tuple[LoopbackCluster, AddedNode], undisturbed: Run
) -> None:
    cluster, node = two_nodes
    run = Run(cli, tmp_path, cluster.address, "shrunk", *SETTINGS, "cluster.num_workers=[1,2]")
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.power_off(node)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), (result["error"], err)
    rows, whole = run.rows(), undisturbed.rows()
    assert (rows[1]["world_size"], rows[STEPS]["world_size"]) == (2, 1)
    assert {s: r["digest"] for s, r in rows.items()} == {s: r["digest"] for s, r in whole.items()}
    assert {s: r["loss"] for s, r in rows.items()} == pytest.approx({s: r["loss"] for s, r in whole.items()}, rel=1e-5)


@pytest.mark.faults
def test_a_run_that_stays_below_its_minimum_ends_in_time_and_can_be_resumed(
    cli: str, tmp_path: Path, two_nodes: tuple[LoopbackCluster, AddedNode]
) -> None:
    cluster, node = two_nodes
    run = Run(cli, tmp_path, cluster.address, "short", *SETTINGS, "cluster.start_timeout_s=40")
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.power_off(node)
    code, result, err = run.finish()
    assert (code, result["state"], result["error"]["type"]) == (1, "failed", "StartTimeoutError"), err
    resumed = Run(cli, tmp_path, cluster.address, "short", *SETTINGS, "cluster.num_workers=1", "--resume")
    code, result, err = resumed.finish()
    assert (code, result["state"], result["steps"]) == (0, "completed", STEPS), (result["error"], err)


def _check_equal(run: Run, whole: Run) -> None:
    rows, wanted = run.rows(), whole.rows()
    assert sorted(rows) == list(range(1, STEPS + 1))
    for key in ("loss", "digest", "position", "lr"):
        assert [rows[s][key] for s in sorted(rows)] == [wanted[s][key] for s in sorted(wanted)], key
    assert run.state() == whole.state()
