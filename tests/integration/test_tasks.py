"""Tasks on a real Ray, before a fork server of our own that loses some."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from dist_ft.coordinator.exports import TaskSpec
from dist_ft.errors import DataError, WorkerCrashError
from dist_ft.orchestrate.tasks import run_tasks


class Server:
    """Answers each request with its own arguments; the first `num_lost` of a name it lets die."""

    def __init__(self, path: Path, num_lost: dict[str, int]) -> None:
        self.asked: list[str] = []
        self._lost = dict(num_lost)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            line = connection.makefile("rb").readline()
            if line:  # else somebody only looks whether we are there
                self._answer(connection, json.loads(line))
            connection.close()

    def _answer(self, connection: socket.socket, request: dict[str, Any]) -> None:
        name = request["name"]
        self.asked.append(name)
        self._lost[name] = self._lost.get(name, 0) - 1
        if self._lost[name] >= 0:
            return
        answer = {"error": DataError("bad row").to_dict()} if name == "bad" else {"result": request["arguments"]}
        connection.sendall(json.dumps(answer).encode() + b"\n")


@pytest.fixture
def on_ray(ray_address: str) -> Iterator[str]:
    ray.init(address=ray_address, log_to_driver=False)
    yield ray.get_runtime_context().get_node_id()
    ray.shutdown()


def test_results_come_in_order_and_a_task_that_dies_is_run_once_more(on_ray: str, tmp_path: Path) -> None:
    server = Server(tmp_path / "s", {"dies once": 1, "dies twice": 2})
    specs = [TaskSpec("dies once", {"n": 0}), TaskSpec("lives", {"n": 1}), TaskSpec("lives", {"n": 2})]
    starters = {on_ray: str(tmp_path / "s")}
    assert run_tasks(specs, starters, False, lambda: None) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert server.asked.count("dies once") == 2
    with pytest.raises(WorkerCrashError, match="died"):
        run_tasks([TaskSpec("dies twice", {})], starters, False, lambda: None)
    assert server.asked.count("dies twice") == 2
    with pytest.raises(DataError, match="bad row"):
        run_tasks([TaskSpec("bad", {})], starters, False, lambda: None)
    assert server.asked.count("bad") == 1, "what cannot help is not tried again"
