"""Runs a forked child, which trains as a rank, runs one task or is an engine. Imports torch, never ray."""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import torch

from dist_ft import errors
from dist_ft.config import config_from_dict
from dist_ft.engine.protocol import EngineSpec
from dist_ft.errors import DivergedError, StalledError
from dist_ft.layout import rank_log_name
from dist_ft.messages import (
    Leaving,
    Message,
    Phase,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    Reply,
    encode_line,
    message_to_dict,
)
from dist_ft.orchestrate.workers.processes import TaskRequest, decode_request
from dist_ft.orchestrate.workers.stacks import answer_to_dump_signal
from dist_ft.run.attempt_spec import RankSpec
from dist_ft.run.place import node_dir
from dist_ft.train.build import build_rank
from dist_ft.train.loop import run_loop
from dist_ft.zero.devices import use_device
from dist_ft.zero.engine import init_process_group, open_store

logger = logging.getLogger(__name__)

_RENDEZVOUS_LIMIT_S = 300.0
_COMMIT_LIMIT_S = 3600.0
_LEASE_LOST = 4  # exit status of a child whose client is gone


def run_child(connection: socket.socket) -> int:
    """Read what to run, run it, and return the exit status."""
    reader = connection.makefile("rb")
    line = reader.readline()
    if not line:
        return _LEASE_LOST
    request = decode_request(line)
    if isinstance(request, TaskRequest):
        return _run_task(connection, reader, request)
    if isinstance(request, EngineSpec):
        # Its libraries are of the extra `serving`, which a node that only trains need not have.
        from dist_ft.engine.process import run_engine

        return run_engine(connection, reader, request)
    return _run_rank(SocketLink(connection, reader), request)


class SocketLink:
    """The rank's connection to its supervisor. A thread sends, so that a step never waits for it."""

    def __init__(self, connection: socket.socket, reader: BinaryIO) -> None:
        self._connection = connection
        self._reader = reader
        self._reply = Reply()
        self._told_to_end = False
        self._changed = threading.Condition()
        self._outbox: queue.Queue[Message | None] = queue.Queue()
        threading.Thread(target=self._receive, name="lease", daemon=True).start()
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()

    def send(self, message: Message) -> None:
        """See `train.link.Link`."""
        self._outbox.put(message)

    def should_stop(self) -> bool:
        """See `train.link.Link`."""
        if self._told_to_end:
            self._told_to_end = False
            self.send(Leaving("SIGTERM"))
        return self._reply.stop

    def on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """Record the signal; the loop acts on it after the step."""
        self._told_to_end = True

    def wait_committed(self, step: int) -> None:
        """See `train.link.Link`."""
        self._wait(lambda reply: reply.committed_step >= step, _COMMIT_LIMIT_S, f"the commit of step {step}")

    def wait_rendezvous(self) -> tuple[str, int]:
        """Return where rank 0 listens."""
        self._wait(lambda reply: reply.rendezvous is not None, _RENDEZVOUS_LIMIT_S, "the rendezvous with rank 0")
        assert self._reply.rendezvous is not None
        return self._reply.rendezvous

    def flush(self) -> None:
        """Wait until everything is sent; nothing can be sent afterwards."""
        self._outbox.put(None)
        self._sender.join(10)

    def _wait(self, condition: Callable[[Reply], bool], limit_s: float, what: str) -> None:
        deadline = time.monotonic() + limit_s
        with self._changed:
            while not condition(self._reply):
                if time.monotonic() > deadline:
                    raise StalledError(f"waited {limit_s:.0f} s for {what}")
                self._changed.wait(1.0)

    def _receive(self) -> None:
        try:
            for line in self._reader:
                reply = Reply.from_dict(json.loads(line))
                with self._changed:
                    self._reply = reply
                    self._changed.notify_all()
        finally:
            # The supervisor is gone, so this rank may not use the device or write any more.
            os._exit(_LEASE_LOST)

    def _send(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._connection.sendall(encode_line(message_to_dict(message)))
        except OSError:
            os._exit(_LEASE_LOST)
        except Exception:  # any error: a rank that cannot report must not go on training
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def _run_rank(link: SocketLink, spec: RankSpec) -> int:
    attempt = spec.attempt
    os.environ.update(spec.env)
    # DeepSpeed reads these; the rendezvous itself uses our own store.
    os.environ.update(RANK=str(spec.rank), WORLD_SIZE=str(spec.world_size), LOCAL_RANK=str(spec.local_rank))
    _log_to(node_dir(attempt.run_dir).logs(attempt.attempt) / rank_log_name(spec.rank))
    answer_to_dump_signal()
    signal.signal(signal.SIGTERM, link.on_sigterm)
    torch.set_num_threads(spec.num_threads)
    link.send(RankStarted(os.getpid(), spec.node_ip))
    try:
        link.send(PhaseChanged(Phase.LOAD, 0))
        _join_group(link, spec)
        parts = build_rank(spec)
        outcome, step = run_loop(parts, link)
        parts.loader.close()
        link.send(RankDone(outcome, step))
        status = 0
    except Exception as error:  # the coordinator must learn of any error
        traceback.print_exc()
        bad_step = error.step if isinstance(error, DivergedError) else None
        link.send(RankFailed(errors.from_exception(error), step=bad_step))
        status = 1
    link.flush()
    # This skips the normal exit, because destructors of process groups would wait for a peer that may be dead.
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _join_group(link: SocketLink, spec: RankSpec) -> None:
    on_gpu = spec.attempt.on_gpu
    if on_gpu:
        use_device(spec.local_rank)
    if spec.rank == 0:
        store = open_store(spec.node_ip, 0, spec.world_size)
        link.send(RendezvousOpen(spec.node_ip, store.port))
    else:
        host, port = link.wait_rendezvous()
        store = open_store(host, spec.rank, spec.world_size, port)
    init_process_group(store, spec.rank, spec.world_size, on_gpu)
    logger.info("rank %d of %d joined", spec.rank, spec.world_size)


def _run_task(connection: socket.socket, reader: BinaryIO, request: TaskRequest) -> int:
    def end_with_client() -> None:
        reader.read()
        os._exit(_LEASE_LOST)

    threading.Thread(target=end_with_client, daemon=True).start()
    os.environ.update(request.env)
    module = importlib.import_module(f"dist_ft.jobs.{request.name}")
    try:
        arguments = {**request.arguments, "config": config_from_dict(request.arguments["config"])}
        answer = {"result": module.run(**arguments)}
    except Exception as error:  # any error is sent to the client
        traceback.print_exc()
        answer = {"error": errors.from_exception(error)}
    connection.sendall(encode_line(answer))
    return 0 if "result" in answer else 1


def _log_to(path: Path) -> None:
    """Redirect everything that this process prints, including C libraries, to a log file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
