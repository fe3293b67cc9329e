"""A plain process that imports everything heavy once and forks ready children. Never imports ray.

Importing torch, DeepSpeed, transformers and peft costs 5 to 11 s a process on two cores; a fork costs
milliseconds. One such server runs per node. A client connects to its Unix socket, sends one JSON line that
says what to run, and from then on talks to the child on that same connection:

- the connection is the child's lease: when the client dies, the child ends itself;
- when the child dies, the server writes `{"exit": status}` and the connection ends.

The server ends when its standard input ends, which is when whoever started it dies. Children live on.
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
    # Imported by the first optimizer and the first engine, 1.4 s a rank.
    "torch._dynamo", "torch.utils.cpp_extension", "deepspeed.runtime.zero.stage3",
    "transformers.models.llama.modeling_llama",
    "dist_ft.train.loop", "dist_ft.train.build", "dist_ft.orchestrate.rank_entry",
    "dist_ft.tasks.prepare", "dist_ft.tasks.export", "dist_ft.tasks.evaluate",
)  # fmt: skip


def serve(listener: socket.socket) -> None:
    """Accepts clients until standard input ends."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, sys.stdin, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(children)
        if sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096):
            return
        if listener in ready:
            connection, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for inherited in (listener, *children.values()):
                    inherited.close()  # a copy held here would keep other leases alive
                for descriptor in (wake_read, wake_write):
                    os.close(descriptor)
                os._exit(_run_child(connection))
            children[pid] = connection


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        connection = children.pop(pid)
        with contextlib.suppress(OSError):  # the client may be gone
            connection.setblocking(False)
            connection.send(b"\n" + json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
        connection.close()


def _run_child(connection: socket.socket) -> int:
    from dist_ft.orchestrate.rank_entry import run_child  # torch is loaded by now

    return run_child(connection)


def main() -> None:
    """Entry of `python -m dist_ft.orchestrate.forkserver SOCKET`."""
    path = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)  # clients may connect at once; they wait for the imports
    for module in PRELOAD:
        importlib.import_module(module)
    serve(listener)


if __name__ == "__main__":
    main()
