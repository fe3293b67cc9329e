"""A group that loses a rank, a worker or a node is formed again, and the result is that of an undisturbed run.

Real processes, real signals, a real Ray. What a restart costs is measured elsewhere.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import Run

STEPS = 60
SETTINGS = ("train.max_steps=60", "checkpoint.every_steps=5", "cluster.num_workers=2", "failure.backoff_s=0.1")


@pytest.fixture(scope="module")
def undisturbed(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Run:
    run = Run(cli, tmp_path_factory.mktemp("undisturbed"), ray_address, "whole", *SETTINGS)
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 1), err
    return run


def _supervisors() -> list[int]:
    """Pids of the Ray workers that supervise ranks."""
    return [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if b"RayTrainWorker" in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _power_off(raylet: int) -> None:
    """Kills a raylet and everything that it started, at once."""
    stats = [(int(p.parent.name), _read(p)) for p in Path("/proc").glob("[0-9]*/stat")]
    parent = {pid: int(stat.rsplit(b")", 1)[1].split()[1]) for pid, stat in stats if stat}
    doomed = [raylet]
    for pid in doomed:
        doomed += [child for child, its_parent in parent.items() if its_parent == pid]
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "SIGKILL of rank 0": lambda record: os.kill(record["workers"][0]["pid"], signal.SIGKILL),
    "SIGKILL of rank 1": lambda record: os.kill(record["workers"][1]["pid"], signal.SIGKILL),
    "SIGKILL of a supervisor": lambda record: os.kill(_supervisors()[0], signal.SIGKILL),
    "SIGSTOP of rank 1": lambda record: os.kill(record["workers"][1]["pid"], signal.SIGSTOP),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_leaves_no_trace_in_the_result(
    fault: str, cli: str, tmp_path: Path, ray_address: str, undisturbed: Run
) -> None:
    run = Run(cli, tmp_path, ray_address, "hurt", *SETTINGS, "failure.step_limit_s=4")
    FAULTS[fault](run.wait_for(lambda record: record["step"] >= 8))
    code, result, err = run.finish()
    assert (code, result["state"], result["attempts"]) == (0, "completed", 2), err
    assert "recovering after step" in err
    assert len(run.events("recovering")) == 1
    _check_equal(run, undisturbed)
    lost = run.events("recovering")[0]["step"] - run.events("attempt")[1]["start_step"]
    assert 0 <= lost <= 5 + 1  # the interval, and a checkpoint that was being written


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


def test_numbers_that_are_not_finite_are_not_tried_again(cli: str, tmp_path: Path, ray_address: str) -> None:
    run = Run(cli, tmp_path, ray_address, "diverged", *SETTINGS, "optimizer.lr=1e30", "optimizer.max_grad_norm=0")
    code, result, err = run.finish()
    assert (code, result["state"], result["attempts"]) == (1, "failed", 1)
    assert result["error"]["type"] == "DivergedError"
    assert "giving up" in err
    assert "not retried" in err


_TWO_NODES = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False,
                                                        "object_store_memory": 80_000_000})
node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
cluster.wait_for_nodes()
print(cluster.address, node.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, int]]:
    """Address of a Ray of two nodes on loopback, and the pid of the second one's raylet."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TWO_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    address, pid = process.stdout.readline().split()
    yield address, int(pid)
    process.stdin.close()
    process.wait(60)


def test_a_run_goes_on_with_fewer_workers_when_a_node_is_lost(
    cli: str, tmp_path: Path, two_nodes: tuple[str, int], undisturbed: Run
) -> None:
    address, raylet = two_nodes
    run = Run(cli, tmp_path, address, "shrunk", *SETTINGS, "cluster.num_workers=[1,2]")
    run.wait_for(lambda record: record["step"] >= 8)
    _power_off(raylet)
    code, result, err = run.finish()
    assert (code, result["state"]) == (0, "completed"), (result["error"], err)
    rows, whole = run.rows(), undisturbed.rows()
    assert (rows[1]["world_size"], rows[STEPS]["world_size"]) == (2, 1)
    assert {s: r["digest"] for s, r in rows.items()} == {s: r["digest"] for s, r in whole.items()}
    assert {s: r["loss"] for s, r in rows.items()} == pytest.approx({s: r["loss"] for s, r in whole.items()}, rel=1e-5)


def test_a_run_that_stays_below_its_minimum_ends_in_time_and_can_be_resumed(
    cli: str, tmp_path: Path, two_nodes: tuple[str, int]
) -> None:
    address, raylet = two_nodes
    run = Run(cli, tmp_path, address, "short", *SETTINGS, "cluster.start_timeout_s=40")
    run.wait_for(lambda record: record["step"] >= 8)
    _power_off(raylet)
    code, result, err = run.finish()
    assert (code, result["state"], result["error"]["type"]) == (1, "failed", "StartTimeoutError"), err
    resumed = Run(cli, tmp_path, address, "short", *SETTINGS, "cluster.num_workers=1", "--resume")
    code, result, err = resumed.finish()
    assert (code, result["state"], result["steps"]) == (0, "completed", STEPS), (result["error"], err)


def _check_equal(run: Run, whole: Run) -> None:
    rows, wanted = run.rows(), whole.rows()
    assert sorted(rows) == list(range(1, STEPS + 1))
    for key in ("loss", "digest", "position", "lr"):
        assert [rows[s][key] for s in sorted(rows)] == [wanted[s][key] for s in sorted(wanted)], key
    assert run.state() == whole.state()
