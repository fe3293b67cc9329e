"""Fixtures that cost something: one fork server and one Ray a session."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from dist_ft.orchestrate.workers.processes import ForkServer

# How long an example takes says how busy the machine is, nothing else.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

_HOLD_RAY = """
import os, sys, logging, ray
os.environ.update(RAY_enable_worker_prestart="0", RAY_prestart_worker_first_driver="0", RAY_USAGE_STATS_ENABLED="0")
context = ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=100_000_000,
                   logging_level=logging.ERROR, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def starter() -> Iterator[str]:
    """Socket of a fork server: forked ranks start in a second instead of ten."""
    server = ForkServer()
    yield server.socket_path
    server.close()


@pytest.fixture(scope="session")
def session_ray() -> Iterator[tuple[str, int]]:
    """Address of a Ray that lives as long as the session, and the pid of the process whose children it is.

    Ray gives a cluster started by `ray.init` a token of its own; this one is set, so that others may join.
    """
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD_RAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    address = process.stdout.readline().strip()
    assert address, "Ray did not start"
    yield address, process.pid
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="session")
def ray_address(session_ray: tuple[str, int]) -> str:
    """Address of the session's Ray."""
    return session_ray[0]


@pytest.fixture(scope="session")
def cli() -> str:
    """Path of the `dist-ft` command of this environment."""
    return str(Path(sys.executable).parent / "dist-ft")


@pytest.fixture(autouse=True)
def _no_rendezvous_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's leftovers of another launcher must not reach the processes under test."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name in os.environ:
            monkeypatch.delenv(name)
