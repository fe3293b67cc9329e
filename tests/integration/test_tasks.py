"""Tasks on a real Ray, before a fork server of our own that loses some."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from dist_ft.errors import DataError


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


# In a process of its own: Ray reads the token of the session's cluster when it is imported.
_DRIVER = """
import json, sys, ray
from dist_ft.jobs.spec import TaskSpec
from dist_ft.errors import DistFtError
from dist_ft.orchestrate.driver.tasks import run_tasks
address, starter, groups = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ray.init(address=address, log_to_driver=False)
starters = {ray.get_runtime_context().get_node_id(): starter}
for names in groups:
    specs = [TaskSpec(name, {"number": number}) for number, name in enumerate(names)]
    try:
        print(json.dumps(run_tasks(specs, starters, False, lambda: None)))
    except DistFtError as error:
        print(json.dumps(error.to_dict()))
"""


def test_results_come_in_order_and_a_task_that_dies_is_run_once_more(ray_address: str, tmp_path: Path) -> None:
    server = Server(tmp_path / "s", {"dies once": 1, "dies twice": 2})
    groups = [["dies once", "lives", "lives"], ["dies twice"], ["bad"]]
    command = [sys.executable, "-c", _DRIVER, ray_address, str(tmp_path / "s"), json.dumps(groups)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    results, twice, bad = (json.loads(line) for line in done.stdout.splitlines()[-3:])
    assert results == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert twice["type"] == "WorkerCrashError"
    assert bad == DataError("bad row").to_dict()
    # What dies twice is given up, what cannot help is not tried again.
    assert [server.asked.count(name) for name in ("dies once", "dies twice", "bad")] == [2, 2, 1]
