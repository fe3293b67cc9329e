"""A Ray of several nodes on loopback, whose nodes come and go; in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HOLD = """
import json, os, sys, time
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_enable_worker_prestart="0", RAY_prestart_worker_first_driver="0")
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
PREEMPTION = 2  # of autoscaler.proto's DrainNodeReason

def add(num_cpus):
    node = cluster.add_node(num_cpus=num_cpus, object_store_memory=80_000_000)
    return {"raylet": node.all_processes["raylet"][0].process.pid, "node_id": node.node_id}

def drain(node_id):
    deadline_ms = int((time.time() + 60) * 1000)
    accepted, reason = GcsClient(address=cluster.address).drain_node(node_id, PREEMPTION, "test", deadline_ms)
    return {"accepted": accepted, "reason": reason}

head = {"num_cpus": int(sys.argv[1]), "include_dashboard": False, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=head)
print(json.dumps({"address": cluster.address}), flush=True)
for line in sys.stdin:
    command, argument = json.loads(line)
    print(json.dumps({"add": add, "drain": drain}[command](argument)), flush=True)
cluster.shutdown()
"""


@dataclass(frozen=True)
class AddedNode:
    """A node besides the head.

    Attributes:
        raylet: Pid of its raylet.
        node_id: Ray's id.
    """

    raylet: int
    node_id: str


class LoopbackCluster:
    """The nodes have one address and one disk; each has its own raylet.

    Attributes:
        address: The head's.
        pid: The process whose children the nodes are.
    """

    def __init__(self, head_cpus: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(head_cpus)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address: str = self._answer()["address"]
        self.pid = self._process.pid

    def add(self, num_cpus: int = 1) -> AddedNode:
        """Adds a node."""
        return AddedNode(**self._ask("add", num_cpus))

    def drain(self, node: AddedNode) -> None:
        """Gives notice that a node will be taken away."""
        answer = self._ask("drain", node.node_id)
        assert answer["accepted"], answer

    def power_off(self, node: AddedNode) -> None:
        """Kills the raylet of a node and everything that it started, at once."""
        kill_tree(node.raylet)

    def close(self) -> None:
        """Ends all nodes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, command: str, argument: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, argument]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


def kill_tree(root: int) -> None:
    """Kills a process and its descendants."""
    for pid in [root, *descendants(root)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(root: int) -> list[int]:
    """Returns the pids of a process's children, their children, and so on."""
    parent = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent[int(stat.parent.name)] = int(stat.read_bytes().rsplit(b")", 1)[1].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, its_parent in parent.items() if its_parent == pid]
    return found[1:]


def command_line(pid: int) -> bytes:
    """Returns what a process was started as; nothing for one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
