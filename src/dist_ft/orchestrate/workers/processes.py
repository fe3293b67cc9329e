"""The client's side of `forkserver`: starts a server, starts children, and talks to them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_ft import errors
from dist_ft.engine.protocol import EngineSpec
from dist_ft.errors import StalledError, WorkerCrashError
from dist_ft.machine import OWN_PYTHON, home_env
from dist_ft.messages import Reply, encode_line
from dist_ft.printable import printable
from dist_ft.run.attempt_spec import RankSpec
from dist_ft.typed_json import from_json

QUIET_ENV = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads would not survive the fork
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
}
"""Environment of processes that import transformers; it turns off the progress bars of libraries."""
_CONNECT_LIMIT_S = 60.0
_REFUSED_LIMIT_S = 3.0
_LAST_LINES = 8
_LAST_BYTES = 4000


@dataclass(frozen=True)
class TaskRequest:
    """A call of `dist_ft.jobs.<name>.run(**arguments)` in a child.

    Attributes:
        name: Module in `dist_ft.jobs`.
        arguments: JSON values.
        env: Environment variables to set first (devices).
    """

    name: str
    arguments: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)


Request = RankSpec | TaskRequest | EngineSpec
"""What a child may run."""


def encode_request(request: Request) -> bytes:
    """Return the line that tells a child what to run."""
    if isinstance(request, RankSpec):
        return encode_line({"entry": "rank", "spec": request.to_dict()})
    if isinstance(request, EngineSpec):
        return encode_line({"entry": "engine", "spec": asdict(request)})
    return encode_line({"entry": "task", **vars(request)})


def decode_request(line: bytes) -> Request:
    """Inverse of `encode_request`."""
    data = json.loads(line)
    entry = data.pop("entry")
    if entry == "rank":
        return RankSpec.from_dict(data["spec"])
    return from_json(EngineSpec, data["spec"]) if entry == "engine" else TaskRequest(**data)


class ForkServer:
    """A fork server owned by this process; it ends with its owner, however that ends.

    Attributes:
        directory: Private directory for all servers from here to `close`; the driver makes it current meanwhile.
        socket_path: Socket of the newest server. Its log lies beside it.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu
        self._num_started = 0
        self.directory = Path(tempfile.mkdtemp(prefix="dist-ft-"))  # mode 0700
        self._start()

    def _start(self) -> None:
        self.socket_path = str(self.directory / f"{self._num_started}.sock")
        self._num_started += 1
        # The accelerator is named, because looking for it would initialise CUDA here, and then no child could use it.
        # Through NVML, torch can look without initialising CUDA.
        device = {"DS_ACCELERATOR": "cuda" if self._on_gpu else "cpu", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        env = {**os.environ, **home_env(), **QUIET_ENV, **device}
        with _log_of(self.socket_path).open("ab") as log:
            self._process = subprocess.Popen(
                [*OWN_PYTHON, "-m", "dist_ft.orchestrate.workers.forkserver", self.socket_path],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,  # Ctrl-C in a terminal goes to the driver only
            )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self._process.poll() is None

    def has_ended(self, within_s: float) -> bool:
        """Return whether the server has ended; it may take a moment after its connections have broken."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def restart(self) -> None:
        """Replace a server that has died, at another socket."""
        self._end()
        self._start()

    def close(self) -> None:
        """End the server; its children continue until their clients disconnect."""
        self._end()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Child:
    """A process forked by a server, and the connection to it. Closing the connection ends the process."""

    def __init__(self, socket_path: str, request: Request) -> None:
        began = time.monotonic()
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(socket_path)
                break
            except (FileNotFoundError, ConnectionRefusedError) as error:  # the server was started a moment ago
                self._socket.close()
                # A socket that refuses has lost its server, but for the moment between its creation and its first use.
                limit_s = _CONNECT_LIMIT_S if isinstance(error, FileNotFoundError) else _REFUSED_LIMIT_S
                if time.monotonic() - began > limit_s:
                    said = last_words(socket_path)
                    raise WorkerCrashError(f"the starter at {socket_path} does not answer{said}") from error
                time.sleep(0.02)
        self._buffer = b""
        self.exit_status: int | None = None
        """Exit status of the process, once known; a negative number is a signal."""
        self.is_closed = False
        """Whether the connection has ended."""
        self._send(encode_request(request))

    def send(self, reply: Reply) -> None:
        """Send a rank the coordinator's answer; `receive` shows if the child is gone."""
        self._send(encode_line(reply.to_dict()))

    def tell(self, message: dict[str, Any]) -> None:
        """Send an engine a message; `receive` shows if the child is gone."""
        self._send(encode_line(message))

    def _send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(line)

    def receive(self, timeout_s: float) -> list[dict[str, Any]]:
        """Return the JSON lines that arrive within the timeout; an empty list when there is none."""
        if self.is_closed:
            return []
        ready, _, _ = select.select([self._socket], [], [], timeout_s)
        if not ready:
            return []
        try:
            data = self._socket.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        messages = []
        for line in filter(None, lines):
            try:
                message = json.loads(line)
            except ValueError:  # an incomplete line of a process that was killed while writing
                continue
            if isinstance(message, dict) and "exit" in message:  # the server's last line
                self.exit_status = message["exit"]
                self.is_closed = True
            else:
                messages.append(message)
        return messages

    def close(self) -> None:
        """End the process by closing its connection."""
        self._socket.close()
        self.is_closed = True


def run_task(
    socket_path: str,
    name: str,
    arguments: dict[str, Any],
    limit_s: float = 6 * 3600.0,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run `dist_ft.jobs.<name>.run(**arguments)` in a child and return its result.

    Args:
        socket_path: A fork server.
        name: Module in `dist_ft.jobs`.
        arguments: JSON values.
        limit_s: Seconds that the task may take.
        env: Environment variables to set first (devices).

    Raises:
        DistFtError: The error of the task, or a WorkerCrashError if its process died.
        StalledError: The task did not end within the limit.
    """
    child = Child(socket_path, TaskRequest(name, arguments, dict(env or {})))
    deadline = time.monotonic() + limit_s
    try:
        while not child.is_closed:
            for message in child.receive(1.0):
                if "error" in message:
                    raise errors.from_dict(message["error"])
                if "result" in message:
                    return dict(message["result"])
            if time.monotonic() > deadline:
                raise StalledError(f"task {name} did not end within {limit_s:.0f} s")
    finally:
        child.close()
    raise WorkerCrashError(f"task {name} died ({describe_exit(child.exit_status)}){last_words(socket_path)}")


def is_serving(socket_path: str) -> bool:
    """Return whether a fork server listens at this socket, even if it is still importing."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(socket_path)
    except OSError:
        return False
    finally:
        connection.close()
    return True


def _log_of(socket_path: str) -> Path:
    return Path(socket_path).with_suffix(".log")


def last_words(socket_path: str) -> str:
    """Return the last lines that a fork server of this machine and its tasks have printed, to go into a message."""
    try:
        text = _log_of(socket_path).read_bytes()[-_LAST_BYTES:].decode(errors="replace")
    except OSError:
        return ""
    lines = [printable(line.rstrip()) for line in text.splitlines() if line.strip()][-_LAST_LINES:]
    return "; the last lines that it printed:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def num_oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory, in this container or else this machine."""
    for counters in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            lines = (line.split() for line in counters.read_text().splitlines())
            return sum(int(value) for name, value in lines if name == "oom_kill")
    return 0


def describe_exit(status: int | None) -> str:
    """Return how a process ended, in words."""
    if status is None:
        return "connection lost"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
