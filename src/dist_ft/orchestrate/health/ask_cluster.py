"""Checks a Ray cluster for `dist-ft doctor --cluster`.

The checks run in a separate process with a time limit, because Ray needs two minutes to notice that nothing answers,
and some failures end the process. A plain TCP connection is tried first, because it shows at once what is wrong.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import ray

from dist_ft.machine import OWN_PYTHON
from dist_ft.orchestrate.health.ask_nodes import LIMIT_S, Member, members, probe_nodes
from dist_ft.orchestrate.health.facts import Check, Requirements
from dist_ft.orchestrate.health.judge import check_versions, check_workers
from dist_ft.orchestrate.workers.nodes import on_node

_CONNECT_LIMIT_S = 3.0
_CONNECT_RAY_LIMIT_S = 60.0  # usually 2 s; 16 s were seen when five processes shared a core
_NODE_LIMIT_S = 30.0
_CONNECTED = "connected"
_LOOPBACK = ("127.0.0.1", "localhost")


def check_cluster(address: str, wanted: Requirements) -> list[Check]:
    """Check the cluster at a Ray address. Never raises; takes at most a minute if no cluster answers.

    Args:
        address: `host:port`, `auto`, or `ray://host:port`.
        wanted: Requirements of a run.
    """
    problem = _unreachable(address)
    if problem is not None:
        return [_no_cluster(address, problem)]
    command = [*OWN_PYTHON, "-m", "dist_ft.orchestrate.health.ask_cluster", address, json.dumps(asdict(wanted))]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        try:
            lines = _output_of(process)
            status = process.wait()
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        words = log.read()
    try:
        return [Check(**check) for check in json.loads(lines[-1])]
    except (IndexError, ValueError, TypeError):
        was_connected = _CONNECTED.encode() in lines
        limit_s = LIMIT_S if was_connected else _CONNECT_RAY_LIMIT_S
        text = f"Ray ended with status {status}" if status != -signal.SIGKILL else f"no answer within {limit_s:g} s"
        return [_no_cluster(address, text, words)]


def _output_of(process: subprocess.Popen[bytes]) -> list[bytes]:
    """Return the lines that the process prints; kill it if it does not connect or end within the limits."""
    assert process.stdout is not None
    watch = threading.Timer(_CONNECT_RAY_LIMIT_S, process.kill)
    watch.start()
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines[-1] == _CONNECTED.encode():
            watch.cancel()
            watch = threading.Timer(LIMIT_S + _NODE_LIMIT_S, process.kill)
            watch.start()
    watch.cancel()
    return lines


def _unreachable(address: str) -> str | None:
    """Return why no Ray can be at an address, or None. Ray listens on the node's address, even for a loopback one."""
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
        # With an explicit address, Ray does not read the token in ~/.ray by itself.
        hint = "export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH where the token is not in ~/.ray"
        return Check("cluster", False, f"the Ray cluster at {address} wants an authentication token", hint)
    hint = "`ray start --head` starts one; else check the address, the firewall, and that Ray runs here too"
    return Check("cluster", False, f"no Ray cluster answers at {address}: {problem}", hint)


def _probe_cluster(address: str, wanted: Requirements) -> Iterator[Check]:
    """Connect and yield the checks; runs in the separate process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="dist-ft-doctor")
    except Exception as error:  # Ray raises many types, for an old version among others
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "version mismatch" in str(error).lower():
            yield Check("versions", False, " ".join(str(error).split()), "install the same versions on every machine")
        else:
            yield _no_cluster(address, text)
        return
    print(_CONNECTED, flush=True)
    try:
        nodes = ray.nodes()
        group = members(nodes, ray.get_runtime_context().get_node_id())
        gone = f", {len(nodes) - len(group)} gone" if len(nodes) > len(group) else ""
        yield Check("cluster", bool(group), f"{address}: {len(group)} nodes alive{gone}")
        total, free = ray.cluster_resources(), ray.available_resources()
        for name in ("CPU", "GPU"):
            shown = f"{free.get(name, 0):g} of {total.get(name, 0):g} free"
            is_ok = name == "GPU" or total.get("CPU", 0) > 0
            yield Check(f"cluster {name}s", is_ok, shown if total.get(name) else "none")
        yield check_workers([member.resources for member in group], wanted)
        here, found = _versions(), _versions_of(group)
        yield check_versions(here, found)
        same = [m for m in group if (found[m.ref.label] or {}).get("dist-ft") == here["dist-ft"]]
        yield from probe_nodes(same, wanted)
    finally:
        ray.shutdown()


def _versions_of(group: Sequence[Member]) -> dict[str, dict[str, str | None] | None]:
    """Return the versions on every node; None for a node that does not answer."""
    ask = ray.remote(num_cpus=0)(_versions)
    asked = {ask.options(scheduling_strategy=on_node(member.node_id)).remote(): member for member in group}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_LIMIT_S)
    found: dict[str, dict[str, str | None] | None] = dict.fromkeys((m.ref.label for m in group), None)
    for reference in ready:
        with contextlib.suppress(Exception):  # a node that dies now counts as one that does not answer
            found[asked[reference].ref.label] = ray.get(reference)
    return found


def _versions() -> dict[str, str | None]:
    """Return the versions that must agree. It is pickled by value, so it also runs on nodes without dist-ft."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("dist-ft", "ray", "torch", "deepspeed", "transformers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


if __name__ == "__main__":
    checks = [asdict(check) for check in _probe_cluster(sys.argv[1], Requirements(**json.loads(sys.argv[2])))]
    print(json.dumps(checks))
