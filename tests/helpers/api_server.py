"""A fine-tuning service in this process, with the stand-in for training, and clients of it."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from dist_ft.launchers.local import LocalLauncher
from dist_ft.service.api_keys import add_key
from dist_ft.service.api_server import Settings, build_app, depot_of, open_index, uvicorn_config
from dist_ft.service.http.gate import Gate
from dist_ft.service.index import Index
from dist_ft.service.tuning.dispatcher import Place
from tests.helpers.paths import ROOT

ENDS = ("succeeded", "failed", "cancelled")
_LIMIT_S = 60.0


@dataclass
class ApiServer:
    """A server that answers: its URL, the directory of its store, its index."""

    url: str
    store: Path
    index: Index

    def client(self, project: str = "default", role: str = "admin") -> OpenAI:
        """Returns a client with a key of its own, which does not hide an error behind retries."""
        key = add_key(self.index, role, project, "test", None)
        return OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0)


@contextmanager
def api_server(
    store: Path | str, max_running: int = 4, scratch: Path | None = None, **settings_of: Any
) -> Iterator[ApiServer]:
    """Serves a store until the block ends; a store at a URL needs a directory for what launchers keep."""
    settings = Settings(store, **settings_of)
    place = depot_of(settings).path
    index = open_index(settings)
    training = [sys.executable, str(ROOT / "tests/helpers/fake_train.py")]
    launcher = LocalLauncher((scratch or place) / "launched", training, 0.05)
    try:
        with in_thread(build_app(settings, index, Place(launcher, max_running))) as url:
            yield ApiServer(url, place, index)
    finally:
        index.close()


@contextmanager
def in_thread(app: Gate) -> Iterator[str]:
    """Serves an application on loopback until the block ends; yields its URL."""
    server = uvicorn.Server(uvicorn_config(app, "127.0.0.1", 0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


def wait_for(condition: Callable[[], object]) -> None:
    """Waits until something is so, or fails."""
    deadline = time.monotonic() + _LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def wait_until(client: OpenAI, job: str, *states: str) -> FineTuningJob:
    """Returns a job once it is in one of these states."""
    wait_for(lambda: client.fine_tuning.jobs.retrieve(job).status in states)
    return client.fine_tuning.jobs.retrieve(job)


def chat_rows(count: int) -> bytes:
    """Returns examples of chat."""
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Four."}]
    return b"".join(json.dumps({"messages": turns}).encode() + b"\n" for _ in range(count))


def pair_rows(count: int) -> bytes:
    """Returns examples of preference."""
    row = {
        "input": {"messages": [{"role": "user", "content": "How many?"}]},
        "preferred_output": [{"role": "assistant", "content": "Four."}],
        "non_preferred_output": [{"role": "assistant", "content": "Many."}],
    }
    return json.dumps(row).encode() + b"\n" if count == 1 else b"".join(pair_rows(1) for _ in range(count))
