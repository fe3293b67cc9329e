"""Runs a function as every rank of a real process group, for tests that must look inside a rank.

No Ray, no coordinator, no supervisor: a helper process imports torch and DeepSpeed once a session (6 to 10 s) and
forks the ranks of each case; pytest's own process is never forked. A body is a function
`body(rank, world_size, **arguments)` in an importable module; arguments and result are JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

_PEER_GRACE_S = 5.0  # what the others get once one rank has failed
_LEASE_LOST = 4
_FAILED = 1


class RankError(AssertionError):
    """Ranks failed; the text holds each one's traceback."""


class RankServer:
    """The helper process; it ends with its owner, and its ranks with it."""

    def __init__(self, log_path: Path) -> None:
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.helpers.ranks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )

    def run(
        self,
        world_size: int,
        body: str,
        arguments: dict[str, Any],
        timeout_s: float = 120.0,
        in_group: bool = True,
    ) -> list[Any]:
        """Returns what `body` ("package.module:function") returned on each rank.

        Args:
            world_size: Number of ranks.
            body: Where the function is.
            arguments: Its keyword arguments besides `rank` and `world_size`.
            timeout_s: All ranks are killed after this.
            in_group: Join the ranks to a gloo process group first.

        Raises:
            RankError: A rank raised, died or was killed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
            request = {
                "world_size": world_size, "body": body, "arguments": arguments, "timeout_s": timeout_s,
                "in_group": in_group, "directory": directory,
            }  # fmt: skip
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                raise RankError(f"the rank server ended ({self._process.wait(5)})")
            return _results(Path(directory), json.loads(line))

    def close(self) -> None:
        """Ends the server and its ranks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """The session's rank server; a `conftest.py` imports it."""
    server = RankServer(tmp_path_factory.mktemp("ranks") / "log")
    yield server
    server.close()


def _results(directory: Path, statuses: list[str]) -> list[Any]:
    results, problems = [], []
    for rank, status in enumerate(statuses):
        path = directory / f"rank-{rank}.json"
        answer = json.loads(path.read_text()) if path.exists() else {}
        if "result" in answer and status == "0":
            results.append(answer["result"])
            continue
        log = (directory / f"rank-{rank}.log").read_text(errors="replace")[-2000:]
        problems.append(f"rank {rank} ended with {status}:\n{answer.get('error') or log}")
    if problems:
        raise RankError("\n".join(problems))
    return results


def main() -> None:
    """Entry of the helper process: one JSON line a case on standard input, one back on standard output."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    from dist_ft.orchestrate.workers.forkserver import PRELOAD

    for module in (*PRELOAD, "tests.helpers.rank_bodies"):
        importlib.import_module(module)
    gc.freeze()  # forks share these pages
    buffer = b""
    while True:
        while b"\n" not in buffer:
            data = os.read(0, 1 << 16)
            if not data:
                return
            buffer += data
        line, buffer = buffer.split(b"\n", 1)
        statuses = _run_case(json.loads(line), replies.fileno())
        replies.write(json.dumps(statuses) + "\n")
        replies.flush()


def _run_case(request: dict[str, Any], replies: int) -> list[str]:
    """Forks the ranks of a case, waits for them within the limit, says how each ended."""
    port_read, port_write = os.pipe()
    lease_read, lease_write = os.pipe()
    pids: dict[int, int] = {}
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            os.close(lease_write)
            os.close(replies)
            os._exit(_run_rank(request, rank, port_read, port_write, lease_read))
        pids[pid] = rank
    for descriptor in (port_read, port_write, lease_read):
        os.close(descriptor)
    statuses = _wait(pids, request["world_size"], time.monotonic() + request["timeout_s"])
    os.close(lease_write)
    return statuses


def _wait(pids: dict[int, int], world_size: int, deadline: float) -> list[str]:
    statuses = [""] * world_size
    is_killed = False
    while pids:
        # Nothing is sent during a case: standard input becomes readable when the owner is gone.
        has_no_owner = bool(select.select([0], [], [], 0.01)[0])
        for pid in list(pids):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            code = os.waitstatus_to_exitcode(status)
            statuses[pids.pop(pid)] = f"{code}" + (" (killed: timeout, or another rank failed)" if is_killed else "")
            if code != 0:
                deadline = min(deadline, time.monotonic() + _PEER_GRACE_S)
        if pids and not is_killed and (has_no_owner or time.monotonic() > deadline):
            is_killed = True
            for pid in pids:  # not reaped yet, so the id is still theirs
                os.kill(pid, signal.SIGKILL)
    return statuses


def _run_rank(request: dict[str, Any], rank: int, port_read: int, port_write: int, lease_read: int) -> int:
    """Runs the body as one rank, in the forked process."""
    directory, world_size = Path(request["directory"]), request["world_size"]
    log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    threading.Thread(target=_end_with_server, args=(lease_read,), daemon=True).start()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        leave = _join_group(rank, world_size, port_read, port_write) if request["in_group"] else None
        module, name = request["body"].split(":")
        body = getattr(importlib.import_module(module), name)
        answer = {"result": body(rank, world_size, **request["arguments"])}
        if leave is not None:
            leave()
    except BaseException:
        answer = {"error": traceback.format_exc()}
    text = json.dumps(answer)
    (directory / f".rank-{rank}").write_text(text)
    (directory / f".rank-{rank}").rename(directory / f"rank-{rank}.json")
    return 0 if "result" in answer else _FAILED


def _join_group(rank: int, world_size: int, port_read: int, port_write: int) -> Any:
    """Joins the group on one thread, as ranks in CI do; returns the barrier to leave it by."""
    import torch

    from dist_ft.orchestrate.workers.network import interface_of
    from dist_ft.zero.engine import init_process_group, open_store

    torch.set_num_threads(1)
    host = "127.0.0.1"
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(host) or os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if rank == 0:
        store = open_store(host, 0, world_size)
        os.write(port_write, b"%05d" % store.port * (world_size - 1))
    os.close(port_write)
    if rank > 0:
        port = os.read(port_read, 5)
        assert port, "rank 0 died before it listened"
        store = open_store(host, rank, world_size, int(port))
    init_process_group(store, rank, world_size, on_gpu=False)
    return torch.distributed.barrier


def _end_with_server(lease: int) -> None:
    os.read(lease, 1)
    os._exit(_LEASE_LOST)


if __name__ == "__main__":
    main()
