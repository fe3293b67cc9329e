"""A real `ray start --head` with dashboard and token on loopback; in a process of its own."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.cluster import kill_tree

_START_LIMIT_S = 90.0
_PORTS = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")


class RayHead:
    """The head, its only node.

    Args:
        num_cpus: Its worker slots.
        env: Variables for it and its clients, besides this process's and a token.

    Attributes:
        gcs_port: Where nodes and drivers join.
        url: Its dashboard.
        directory: Where its session lies, with sockets and logs.
        env: Environment of its clients, with the token.
    """

    def __init__(self, num_cpus: int = 4, env: Mapping[str, str] | None = None) -> None:
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.directory = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))  # sockets below it: 107 characters in all
        self.url = f"http://127.0.0.1:{ports['--dashboard-port']}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.gcs_port = ports["--port"]
        self.env = {**os.environ, **(env or {}), **token, "RAY_USAGE_STATS_ENABLED": "0"}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            self.env.pop(name, None)
        # Jobs look for `dist-ft` on the head's PATH.
        environment = {**self.env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus", str(num_cpus),
                "--object-store-memory", "100000000", "--temp-dir", str(self.directory),
                "--dashboard-host", "127.0.0.1", *(str(word) for port in ports.items() for word in port),
            ],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    def jobs(self) -> list[str]:
        """Submission ids of all jobs that it has been given, past ones too."""
        return [job["submission_id"] for job in json.loads(self.ask("/api/jobs/"))]

    def ask(self, path: str) -> bytes:
        """Returns what the dashboard answers to a GET with the token."""
        token = {"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}{path}", headers=token), timeout=30) as reply:
            return bytes(reply.read())

    def close(self) -> None:
        """Ends the head and all that it has started."""
        kill_tree(self._process.pid)
        self._process.wait(30)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _START_LIMIT_S
        while _status(f"{self.url}/api/version") != 401:  # it answers, and asks for the token
            assert self._process.poll() is None, "ray start has ended"
            assert time.monotonic() < deadline, "ray start takes too long"
            time.sleep(0.2)


def _status(url: str) -> int:
    try:
        return int(urllib.request.urlopen(url, timeout=5).status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _free_ports(count: int) -> list[int]:
    """Asks the system for ports; they lie beyond those that Ray keeps for its workers."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
