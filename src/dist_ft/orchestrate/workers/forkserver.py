"""Runs a plain process that imports all heavy packages once and forks ready children. Never imports ray.

Importing torch, DeepSpeed, transformers and peft costs 5 to 11 s per process on two cores; a fork costs milliseconds.
One server runs per node. A client connects to its Unix socket, sends one JSON line that says what to run, and then
talks to the child on the same connection:

- the connection is the child's lease: when the client dies, the child ends itself, and is killed if it cannot;
- when the child dies, the server writes `{"exit": status}` and the connection ends.

When the process that started the server dies, the server's standard input ends. It then takes no more clients, and ends
after its last child. If the server is killed, its children live on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

PRELOAD = (
    "torch", "torch.distributed", "numpy", "pyarrow", "transformers", "peft", "deepspeed",
    # The first optimizer and the first engine import these, which takes 1.4 s per rank.
    "torch._dynamo", "torch.utils.cpp_extension", "deepspeed.runtime.zero.stage3",
    "transformers.models.llama.modeling_llama",
    "dist_ft.train.loop", "dist_ft.train.build", "dist_ft.orchestrate.workers.child",
    "dist_ft.jobs.prepare", "dist_ft.jobs.export", "dist_ft.jobs.evaluate",
)  # fmt: skip
_CLIENT_GONE = select.POLLRDHUP if sys.platform == "linux" else select.POLLHUP


class _Server:
    """Forks children for clients, and ends those whose client is gone."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._children: dict[int, socket.socket] = {}  # by pid
        self._watch = select.poll()
        for descriptor in (listener.fileno(), sys.stdin.fileno(), self._wake_read):
            self._watch.register(descriptor, select.POLLIN)

    def serve(self) -> None:
        """Accept clients until standard input ends, then serve until the last child has ended."""
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        is_owned = True
        while is_owned or self._children:
            for descriptor, _ in self._watch.poll():
                if descriptor == self._wake_read:
                    os.read(self._wake_read, 4096)
                    self._reap()
                elif descriptor == self._listener.fileno():
                    self._fork()
                elif descriptor != sys.stdin.fileno():
                    self._end(descriptor)
                elif not os.read(descriptor, 4096):
                    is_owned = False
                    self._watch.unregister(descriptor)
                    self._watch.unregister(self._listener)

    def _fork(self) -> None:
        connection, _ = self._listener.accept()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for inherited in (self._listener, *self._children.values()):
                inherited.close()  # a copy held here would keep other leases alive
            for descriptor in (self._wake_read, self._wake_write):
                os.close(descriptor)
            os._exit(_run_child(connection))
        self._children[pid] = connection
        self._watch.register(connection, _CLIENT_GONE)

    def _end(self, descriptor: int) -> None:
        """Kill the child whose client is gone; a child that is stopped or hangs in C cannot end itself."""
        for pid, connection in self._children.items():
            if connection.fileno() == descriptor:
                self._watch.unregister(descriptor)
                os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
                return

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            connection = self._children.pop(pid)
            with contextlib.suppress(KeyError):  # removed already, when its client was found to be gone
                self._watch.unregister(connection)
            with contextlib.suppress(OSError):  # the client may be gone
                connection.setblocking(False)
                connection.send(b"\n" + json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            connection.close()


def _run_child(connection: socket.socket) -> int:
    from dist_ft.orchestrate.workers.child import run_child  # torch is loaded by now

    return run_child(connection)


def main() -> None:
    """Entry of `python -m dist_ft.orchestrate.workers.forkserver SOCKET`."""
    path = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)  # clients may connect at once; they wait for the imports
    for module in PRELOAD:
        importlib.import_module(module)
    _Server(listener).serve()


if __name__ == "__main__":
    main()
