"""Runs an engine in a forked child: requests come in as lines, events go out as lines (`engine/protocol.py`)."""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import traceback
from collections.abc import Iterable
from dataclasses import asdict
from typing import BinaryIO

import torch

from dist_ft import errors
from dist_ft.engine.answering import Engine
from dist_ft.engine.protocol import Ask, EngineSpec, Event
from dist_ft.machine import num_cores
from dist_ft.messages import encode_line
from dist_ft.typed_json import from_json

_LEASE_LOST = 4  # as in `orchestrate/workers/child.py`


def run_engine(connection: socket.socket, reader: BinaryIO, spec: EngineSpec) -> int:
    """Answer until the client is gone.

    Returns:
        The exit status, if the engine fails.
    """
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def receive() -> None:
        for line in reader:
            inbox.put(line)
        os._exit(_LEASE_LOST)

    threading.Thread(target=receive, name="lease", daemon=True).start()
    torch.set_num_threads(spec.num_threads or num_cores())
    try:
        engine = Engine(spec)
        connection.sendall(encode_line({"ready": os.getpid()}))
        while True:
            _take(engine, inbox, connection)
            _send(connection, engine.step())
    except Exception as error:  # any error is sent to the client
        traceback.print_exc()
        connection.sendall(encode_line({"error": errors.from_exception(error)}))
        return 1


def _take(engine: Engine, inbox: queue.SimpleQueue[bytes], connection: socket.socket) -> None:
    """Take what has come; wait while there is nothing to do."""
    while engine.is_idle or not inbox.empty():
        message = json.loads(inbox.get())
        if "cancel" in message:
            engine.cancel(message["cancel"])
        else:
            _send(connection, [engine.submit(from_json(Ask, message["ask"]))])


def _send(connection: socket.socket, events: Iterable[Event]) -> None:
    lines = [encode_line({"event": type(event).__name__, **asdict(event)}) for event in events]
    if lines:
        connection.sendall(b"".join(lines))  # the client always reads
