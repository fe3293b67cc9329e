"""What `dist-ft doctor --cluster` finds out about a Ray cluster.

The look happens in a process of its own with a time limit: where nothing answers, connecting takes Ray two
minutes, some failures end the process, and neither may happen to the command. A plain TCP connection is tried
first, because it says in a moment what is wrong.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dist_ft.plan.doctor import Check

_CONNECT_LIMIT_S = 3.0
_LOOK_LIMIT_S = 16.0
_NODE_LIMIT_S = 10.0
_VERSIONS = "cluster versions"
_VERSIONS_HINT = "install the same versions on every machine"
_LOOPBACK = ("127.0.0.1", "localhost")


def check_cluster(address: str) -> list[Check]:
    """Looks at the cluster at a Ray address; takes at most about 20 s and never raises.

    Args:
        address: `host:port`, `auto`, or `ray://host:port`.
    """
    problem = _unreachable(address)
    if problem is not None:
        return [_no_cluster(address, problem)]
    command = [sys.executable, "-m", "dist_ft.orchestrate.inspect_cluster", address]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LOOK_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        return [_no_cluster(address, f"no answer within {_LOOK_LIMIT_S:g} s", error.stderr or b"")]
    try:
        return [Check(**check) for check in json.loads(done.stdout.splitlines()[-1])]
    except (IndexError, ValueError, TypeError):
        return [_no_cluster(address, f"Ray ended with status {done.returncode}", done.stderr)]


def _unreachable(address: str) -> str | None:
    """Returns why nothing can be there, or None. Ray listens on the node's address, also for a local one."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        return None if address == "auto" else "not a Ray address; write host:port, ray://host:port or auto"
    hosts = [host, ray.util.get_node_ip_address()] if host in _LOOPBACK else [host]
    problem = ""
    for candidate in hosts:
        try:
            socket.create_connection((candidate, int(port)), _CONNECT_LIMIT_S).close()
            return None
        except (OSError, OverflowError) as error:
            problem = problem or str(error)
    return problem


def _no_cluster(address: str, problem: str, log: bytes = b"") -> Check:
    if b"InvalidAuthToken" in log or b"Unauthenticated" in log:
        # For an explicit address Ray never takes the token of ~/.ray by itself.
        hint = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the token is not in ~/.ray"
        return Check("cluster", False, f"the Ray cluster at {address} wants an authentication token", hint)
    hint = "`ray start --head` starts one; else check the address, the firewall, and that Ray runs here too"
    return Check("cluster", False, f"no Ray cluster answers at {address}: {problem}", hint)


def _look(address: str) -> list[Check]:
    """Connects and looks; runs in the process of its own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="dist-ft-doctor")
    except Exception as error:  # Ray raises many types, for an old version among others
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "version mismatch" in str(error).lower():
            return [Check(_VERSIONS, False, " ".join(str(error).split()), _VERSIONS_HINT)]
        return [_no_cluster(address, text)]
    try:
        return list(_describe(address))
    finally:
        ray.shutdown()


def _describe(address: str) -> Iterator[Check]:
    nodes = ray.nodes()
    alive = [node for node in nodes if node["Alive"]]
    gone = f", {len(nodes) - len(alive)} gone" if len(nodes) > len(alive) else ""
    yield Check("cluster", bool(alive), f"{address}: {len(alive)} nodes alive{gone}")
    total, free = ray.cluster_resources(), ray.available_resources()
    for name in ("CPU", "GPU"):
        shown = f"{free.get(name, 0):g} of {total.get(name, 0):g} free"
        is_ok = name == "GPU" or total.get("CPU", 0) > 0
        yield Check(f"cluster {name}s", is_ok, shown if total.get(name) else "none")
    yield _compare_versions([(node["NodeID"], node["NodeManagerAddress"]) for node in alive])


def _compare_versions(nodes: list[tuple[str, str]]) -> Check:
    """Asks every node what it would run, as a task that needs no slot."""
    ask = ray.remote(num_cpus=0)(_versions)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): ip
        for node, ip in nodes
    }
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_LIMIT_S)
    here, problems = _versions(), []
    for reference, ip in asked.items():
        found: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # a node that dies now is a problem like one that is silent
            found = ray.get(reference) if reference in ready else {}
        if found != here:
            wrong = [f"{key} {found.get(key)}, here {here[key]}" for key in here if found.get(key) != here[key]]
            problems.append(f"{ip}: {', '.join(wrong) if found else 'no answer'}")
    if problems:
        return Check(_VERSIONS, False, "; ".join(problems), _VERSIONS_HINT)
    shown = ", ".join(f"{key} {value}" for key, value in here.items())
    return Check(_VERSIONS, True, f"{shown} on every node")


def _versions() -> dict[str, str | None]:
    """Returns the versions that must agree. Pickled by value, so it also runs where dist-ft is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("ray", "dist-ft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    print(json.dumps([asdict(check) for check in _look(sys.argv[1])]))
