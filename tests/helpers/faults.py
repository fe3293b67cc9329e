"""Faults: what is done to a run, and at which moment. Real processes, real signals."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.lineage import committed
from dist_ft.storage.store import LocalStore
from tests.helpers.cluster import AddedNode, LoopbackCluster, command_line, descendants
from tests.helpers.runs import Run

INJECT = Path(__file__).parent / "inject"
STEP = 8
"""Completed steps at which most faults strike."""


@dataclass
class Scene:
    """A run and the machines it is on.

    Attributes:
        run: The run.
        ray_pid: The process whose descendants the Ray nodes are.
        cluster: Its nodes, when they come and go.
        nodes: Those besides the head.
    """

    run: Run
    ray_pid: int
    cluster: LoopbackCluster | None = None
    nodes: list[AddedNode] = field(default_factory=list)

    def at(self, step: int = STEP) -> dict[str, Any]:
        """Waits for a step; returns run.json."""
        return self.run.wait_for(lambda record: record["step"] >= step and record["state"] == "running")

    def pid(self, rank: int) -> int:
        """Pid of a rank of the present attempt."""
        workers = self.run.wait_for(lambda record: len(record["workers"]) > rank)["workers"]
        return int(workers[rank]["pid"])

    def find(self, name: bytes, root: int | None = None) -> list[int]:
        """Pids below `root` (or the Ray nodes) whose command line holds a text."""
        return [pid for pid in descendants(root or self.ray_pid) if name in command_line(pid)]

    def until(self, condition: Callable[[], Any], limit_s: float = 120.0) -> Any:
        """Waits until a condition holds, looking often; returns what it gave."""
        deadline = time.monotonic() + limit_s
        while not (found := condition()):
            assert time.monotonic() < deadline, f"it did not come to that within {limit_s:.0f} s"
            assert self.run.process.poll() is None, self.run.process.communicate()
            time.sleep(0.002)
        return found

    def event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Waits for the `count`-th ledger entry of a kind."""
        return dict(self.until(lambda: len(found := self._events(name)) >= count and found[count - 1]))

    def _events(self, name: str) -> list[dict[str, Any]]:
        return self.run.events(name) if self.run.dir.ledger.exists() else []


@dataclass(frozen=True)
class Fault:
    """What is done to a run.

    Attributes:
        strike: Does it, at its moment.
        settings: Overrides that it needs.
        inject: What goes wrong inside a rank: (kind, rank, step).
        nodes: Ray nodes of one CPU besides the head; the head has the rest of the workers.
        lost: Most steps that may be made again; None where nothing is said.
        resume: The command ends and is given again with `--resume`.
        said: What standard error must say.
    """

    strike: Callable[[Scene], None] = lambda scene: None
    settings: tuple[str, ...] = ()
    inject: tuple[str, int, int] | None = None
    nodes: int = 0
    lost: int | None = None
    resume: bool = False
    said: str = ""

    def env(self, directory: Path) -> dict[str, str]:
        """Environment of the run."""
        if self.inject is None:
            return {}
        kind, rank, step = self.inject
        fault = {"kind": kind, "rank": rank, "step": step, "once": str(directory / "struck")}
        return {"PYTHONPATH": str(INJECT), "DIST_FT_TEST_FAULT": json.dumps(fault)}


def _signal(rank: int, number: int = signal.SIGKILL) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.at()
        os.kill(scene.pid(rank), number)

    return strike


def _kill_all(scene: Scene) -> None:
    for worker in scene.at()["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)


def _kill_found(name: bytes) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.at()
        os.kill(scene.find(name)[0], signal.SIGKILL)

    return strike


def _stop_supervisor(scene: Scene) -> None:
    scene.at()
    os.kill(scene.find(b"RayTrainWorker")[0], signal.SIGSTOP)


def _kill_starter_then_rank(scene: Scene) -> None:
    scene.at()
    starter = scene.find(b"forkserver", scene.run.process.pid)[0]  # the ranks are its children
    rank = scene.pid(1)
    os.kill(starter, signal.SIGKILL)
    os.kill(rank, signal.SIGKILL)


def _kill_while_saving(scene: Scene) -> None:
    scene.at()
    pid, folder = scene.pid(1), scene.run.dir.checkpoint(15, 1)
    scene.until(folder.exists)
    os.kill(pid, signal.SIGKILL)


def _kill_while_loading(scene: Scene) -> None:
    old = {worker["pid"] for worker in scene.at()["workers"]}
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    pids = lambda record: [worker["pid"] for worker in record["workers"]]  # noqa: E731
    new = pids(scene.run.wait_for(lambda record: pids(record) and not old & set(pids(record))))
    assert len(scene._events("loaded")) == 1, "it had loaded already"
    os.kill(new[0], signal.SIGKILL)


def _kill_while_evaluating(scene: Scene) -> None:
    pid = scene.pid(1)
    scene.until(lambda: 10 in scene.run.rows())
    os.kill(pid, signal.SIGKILL)


def _kill_while_draining(scene: Scene) -> None:
    scene.at()
    pid = scene.pid(0)
    assert scene.cluster is not None
    scene.cluster.drain(scene.nodes[0])
    scene.event("resizing")
    os.kill(pid, signal.SIGKILL)


def _kill_while_forming(scene: Scene) -> None:
    """The driver loses its group, and the new one a worker before it has begun."""
    scene.at()
    os.kill(scene.pid(0), signal.SIGKILL)
    scene.event("recovering")
    old = set(scene.find(b"RayTrainWorker"))
    new = scene.until(lambda: set(scene.find(b"RayTrainWorker")) - old)
    os.kill(new.pop(), signal.SIGKILL)


def _kill_twice(scene: Scene) -> None:
    scene.at()
    first = scene.pid(0)
    os.kill(first, signal.SIGKILL)
    scene.event("attempt", 2)
    pids = lambda record: [w["pid"] for w in record["workers"]]  # noqa: E731
    record = scene.run.wait_for(lambda record: len(pids(record)) >= 2 and first not in pids(record))
    os.kill(pids(record)[1], signal.SIGKILL)


def _power_off(scene: Scene) -> None:
    scene.at()
    assert scene.cluster is not None
    scene.cluster.power_off(scene.nodes[-1])


def _kill_raylet(scene: Scene) -> None:
    scene.at()
    os.kill(scene.nodes[-1].raylet, signal.SIGKILL)


def _flap(scene: Scene) -> None:
    _power_off(scene)
    assert scene.cluster is not None
    second = scene.cluster.add()
    scene.event("attempt", 2)
    scene.cluster.power_off(second)


def _off_and_back(scene: Scene) -> None:
    _power_off(scene)
    assert scene.cluster is not None
    time.sleep(5.0)  # below the minimum
    scene.cluster.add()


def _join(scene: Scene) -> None:
    scene.at()
    assert scene.cluster is not None
    scene.cluster.add()


def _give_notice(scene: Scene) -> None:
    scene.at()
    assert scene.cluster is not None
    scene.cluster.drain(scene.nodes[-1])


def _kill_driver(scene: Scene) -> None:
    scene.at()
    scene.run.process.kill()


def _ask_to_stop(scene: Scene) -> None:
    scene.at()
    scene.run.process.send_signal(signal.SIGTERM)


def _no_room_for_one_save(scene: Scene) -> None:
    """Files of rank 1 may not grow over 4 KiB for as long as one save fails: as on a full disk."""
    scene.at()
    pid = scene.pid(1)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, hard))
    scene.event("save_failed")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def _damage(change: Callable[[Path], None]) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.at(STEP + 5)
        pid = scene.pid(0)
        os.kill(pid, signal.SIGKILL)
        newest = committed(LocalStore(scene.run.dir.path))[-1]
        change(scene.run.dir.path / newest.directory / newest.files[0].name)

    return strike


def _flip_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


_GROWS = ("cluster.grow_after_s=1", "cluster.grow_if_it_pays=false")
_STALLS = ("failure.limits.step_s=4",)

FAULTS: dict[str, Fault] = {
    "SIGKILL of rank 0": Fault(_signal(0), lost=6),
    "SIGKILL of another rank": Fault(_signal(1), lost=6),
    "SIGKILL of all ranks at once": Fault(_kill_all, lost=6),
    "SIGKILL of a supervisor": Fault(_kill_found(b"RayTrainWorker"), lost=6),
    "SIGKILL of the starter, then of a rank": Fault(_kill_starter_then_rank, lost=6),
    "SIGKILL of the coordinator": Fault(_kill_found(b"CoordinatorActor")),
    "SIGKILL of Ray Train's controller": Fault(_kill_found(b"TrainController")),
    "SIGKILL of the driver, then --resume": Fault(_kill_driver, resume=True),
    "SIGTERM of the driver, then --resume": Fault(_ask_to_stop, resume=True, lost=0),
    "SIGTERM of a rank": Fault(_signal(1, signal.SIGTERM), lost=0, said="told to end (SIGTERM)"),
    "SIGSTOP of a rank": Fault(_signal(1, signal.SIGSTOP), _STALLS, lost=6, said="rank 1 makes no progress"),
    "hang in a step": Fault(settings=_STALLS, inject=("hang", 1, STEP), lost=6, said="rank 1 makes no progress"),
    "SIGSTOP of a supervisor": Fault(_stop_supervisor, ("failure.limits.silence_s=8",), lost=20),
    "exception in a step": Fault(inject=("exception", 1, STEP), lost=6, said="nobody foresaw"),
    "exit(0) of a rank": Fault(inject=("exit", 1, STEP), lost=6, said="exit status 0"),
    "no memory": Fault(inject=("allocate", 0, STEP), lost=6, said="max_out_of_memory"),
    "loss NaN, rolled back": Fault(settings=("failure.bad_numbers=rollback",), inject=("nan", 1, STEP), lost=6),
    "SIGKILL during a save": Fault(_kill_while_saving, lost=11),
    "SIGKILL during a load": Fault(_kill_while_loading),
    "SIGKILL during an evaluation": Fault(_kill_while_evaluating, ("eval.every_steps=5",)),
    "SIGKILL while a group is formed": Fault(_kill_while_forming),
    "two faults in one recovery": Fault(_kill_twice),
    "no room for a save": Fault(_no_room_for_one_save, lost=0, said="is left out"),
    "newest checkpoint damaged": Fault(_damage(_flip_byte), lost=16, said="damaged and passed over"),
    "newest checkpoint truncated": Fault(_damage(_truncate), lost=16, said="damaged and passed over"),
    "node switched off": Fault(_power_off, nodes=1, lost=6),
    "SIGKILL of a raylet": Fault(_kill_raylet, nodes=1, lost=6),
    "node that flaps": Fault(_flap, nodes=1),
    "below the minimum and back": Fault(_off_and_back, nodes=1),
    "node joins": Fault(_join, _GROWS, lost=0, said="room for"),
    "node gives notice": Fault(_give_notice, nodes=1, lost=0, said="will leave the cluster"),
    "SIGKILL during a drain": Fault(_kill_while_draining, nodes=1),
}
