"""W&B online, against a stand-in for its server: nothing is lost, whatever the server answers, and nobody waits for it.

The sink runs in a process of its own, as in a run, which can die with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.wandb_server import CLIENT_TIMEOUT_S, MOODS, WandbServer

_SINK = """
import logging, sys
from pathlib import Path
from dist_ft.config.schema import MonitorConfig
from dist_ft.monitor.sink import History, SinkRun
from dist_ft.monitor.sinks import build_sinks
from tests.helpers.rows import step_row
logging.basicConfig(level=logging.WARNING)
rows = [step_row(step) for step in range(1, int(sys.argv[2]) + 1)]
run = SinkRun("name", "project", Path(sys.argv[1]), {"run": {"seed": 7}}, lambda: History(rows))
(sink,) = build_sinks(MonitorConfig(wandb="online", project="project"), {"wandb": "abc12345"}, run)
for line in sys.stdin:
    if line == "end\\n":
        sink.close("completed")
    else:
        sink.log_step(step_row(int(line)))
    print(line, end="", flush=True)
"""


class Child:
    """A process with the sink of a run that has `backlog` steps in its files."""

    def __init__(self, directory: Path, server: WandbServer, backlog: int = 0) -> None:
        waits = {
            f"WANDB__{part}_RETRY_WAIT_{bound}_SECONDS": "1"
            for part in ("FILE_STREAM", "GRAPHQL", "FILE_TRANSFER")
            for bound in ("MIN", "MAX")
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        env = kept | waits | {
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.port}",
            "WANDB_API_KEY": "a" * 40,
            "WANDB__GRAPHQL_RETRY_MAX": "1",
            "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
            "WANDB__FILE_STREAM_TIMEOUT_SECONDS": str(CLIENT_TIMEOUT_S),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }  # fmt: skip
        self.errors = directory / "stderr"
        with self.errors.open("a") as errors:
            self.process = subprocess.Popen(
            [sys.executable, "-c", _SINK, str(directory), str(backlog)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=directory,
            )  # fmt: skip

    def say(self, line: object) -> None:
        """Give the sink a step, or its end; return when it has come back."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == f"{line}\n"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    found = WandbServer().start()
    yield found
    found.stop()


@pytest.fixture
def start(tmp_path: Path, server: WandbServer) -> Iterator[Callable[..., Child]]:
    children: list[Child] = []

    def make(backlog: int = 0) -> Child:
        children.append(Child(tmp_path, server, backlog))
        return children[-1]

    yield make
    for child in children:
        child.process.kill()
        child.process.wait()


def test_a_moody_server_gets_every_row_once(server: WandbServer, start: Callable[..., Child]) -> None:
    server.is_moody = True
    child = start()
    said: list[int] = []
    while not server.had.issuperset(MOODS):  # a row at a time, so that each is a request
        said.append(len(said) + 1)
        child.say(said[-1])
        _wait_until(lambda: len(server.steps) >= len(said))
    child.say("end")
    assert server.steps == said
    assert server.summary["run/state"] == "completed"


def test_a_server_that_is_away_at_the_start_gets_every_row(server: WandbServer, start: Callable[..., Child]) -> None:
    server.stop()
    child = start()
    for step in range(1, 6):
        child.say(step)  # comes back, though nobody listens
    _wait_until(lambda: "W&B cannot be opened" in child.errors.read_text())
    server.start()
    child.say("end")
    assert server.steps == [1, 2, 3, 4, 5]


def test_what_a_dead_server_missed_is_sent_by_the_next_attempt(
    server: WandbServer, start: Callable[..., Child], tmp_path: Path
) -> None:
    first = start()
    for step in range(1, 6):
        first.say(step)
    _wait_until(lambda: server.steps == [1, 2, 3, 4, 5] and server.summary.get("train/step") == 5)
    server.stop()
    for step in range(6, 11):
        first.say(step)
    # As it is half a minute later: they are on this disk, but not with the server.
    (tmp_path / "wandb" / "sent.json").write_text(json.dumps({"step": 10}))
    first.process.kill()
    first.process.wait()
    server.start()
    second = start(backlog=10)
    second.say(11)
    second.say("end")
    assert server.steps == list(range(1, 12))


def _wait_until(is_so: Callable[[], bool], limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)
