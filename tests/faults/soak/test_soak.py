"""Faults at random times for several minutes; the end is what the undisturbed run gives. `make soak`.

`SOAK_SEED` repeats a choice of faults (their moments depend on the machine), `SOAK_S` is how long they go on.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import read_state, relative_l2, weights_of
from tests.helpers.cluster import AddedNode, LoopbackCluster, command_line, descendants
from tests.helpers.runs import Run

pytestmark = pytest.mark.soak

SEED = int(os.environ.get("SOAK_SEED", secrets.randbelow(1 << 32)))
SECONDS = float(os.environ.get("SOAK_S", "300"))
STEPS = 1500
SETTINGS = (f"train.max_steps={STEPS}", "optimizer.lr=3e-4", "checkpoint.every_steps=10", "failure.max_restarts=1000",
            "failure.max_same_step=20", "failure.limits.step_s=6", "failure.limits.silence_s=10")  # fmt: skip
ELASTIC = ("cluster.num_workers=[1,3]", "cluster.grow_after_s=2", "cluster.grow_if_it_pays=false")


class Disturber:
    """Hurts a run in ways that it must survive."""

    def __init__(self, cluster: LoopbackCluster, start: Callable[[], Run], rng: random.Random) -> None:
        self.run = start()
        self._cluster = cluster
        self._start = start
        self._rng = rng
        self._nodes: list[AddedNode] = [cluster.add()]
        self._kinds = {
            "SIGKILL of a rank": lambda: self._signal_rank(signal.SIGKILL),
            "SIGTERM of a rank": lambda: self._signal_rank(signal.SIGTERM),
            "SIGSTOP of a rank": lambda: self._signal_rank(signal.SIGSTOP),
            "SIGKILL of a supervisor": lambda: self._kill_below(cluster.pid, b"RayTrainWorker"),
            "SIGKILL of the coordinator": lambda: self._kill_below(cluster.pid, b"CoordinatorActor"),
            "SIGKILL of the starter": lambda: self._kill_below(self.run.process.pid, b"forkserver"),
            "SIGKILL of the driver": self._kill_driver,
            "node joins": self._join,
            "node gives notice": self._notice,
            "node switched off": self._power_off,
        }
        self._coordinators = 0

    def strike(self) -> str:
        """Does something; returns what."""
        kinds = list(self._kinds)
        if len(self._nodes) >= 2:
            kinds.remove("node joins")
        if not self._nodes:
            kinds = [kind for kind in kinds if kind not in ("node gives notice", "node switched off")]
        if self._coordinators >= 4:  # one more than a driver restarts would end it
            kinds.remove("SIGKILL of the coordinator")
        kind = self._rng.choice(kinds)
        self._coordinators = 0 if "driver" in kind else self._coordinators + ("coordinator" in kind)
        self._kinds[kind]()
        return kind

    def _signal_rank(self, number: int) -> None:
        workers = read_json(self.run.dir.run_json)["workers"] if self.run.dir.run_json.exists() else []
        if workers:
            with suppress(ProcessLookupError):
                os.kill(self._rng.choice(workers)["pid"], number)

    def _kill_below(self, root: int, name: bytes) -> None:
        for pid in [pid for pid in descendants(root) if name in command_line(pid)][:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _kill_driver(self) -> None:
        self.run.process.kill()
        self.run.process.communicate()
        self.run = self._start()

    def _join(self) -> None:
        self._nodes.append(self._cluster.add())

    def _notice(self) -> None:
        self._cluster.drain(self._nodes.pop(0))

    def _power_off(self) -> None:
        self._cluster.power_off(self._nodes.pop())


@pytest.mark.timeout(SECONDS + 1200)
def test_a_run_that_is_hurt_for_minutes_ends_as_if_nothing_had_been(
    cli: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], ray_address: str
) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    whole = Run(cli, tmp_path, ray_address, "whole", *SETTINGS, "cluster.num_workers=2")
    code, result, err = whole.finish(600)
    assert (code, result["attempts"]) == (0, 1), err
    say(f"\nSOAK_SEED={SEED} SOAK_S={SECONDS:.0f}")
    rng = random.Random(SEED)
    cluster = LoopbackCluster()
    try:
        start = lambda: Run(cli, tmp_path, cluster.address, "hurt", *SETTINGS, *ELASTIC, "--resume")  # noqa: E731
        disturber, began, count = Disturber(cluster, start, rng), time.monotonic(), 0
        disturber.run.wait_for(lambda record: record["step"] >= 1)
        while time.monotonic() - began < SECONDS and disturber.run.process.poll() is None:
            time.sleep(rng.uniform(2, 25))
            if disturber.run.process.poll() is None:
                record = read_json(disturber.run.dir.run_json)
                kind, count = disturber.strike(), count + 1
                at = f"attempt {record['attempt']}, {record['world_size']} workers, {record['state']}"
                say(f"  {time.monotonic() - began:4.0f} s  step {record['step']:3} ({at}): {kind}")
        run = disturber.run
        code, result, err = run.finish(600)
    finally:
        disturber.run.process.kill()
        cluster.close()
    assert (code, result["state"]) == (0, "completed"), (result["error"], err)
    record = read_json(run.dir.run_json)
    say(f"  {count} faults, {record['attempt']} attempts, {len(run.all_rows()) - STEPS} steps made again, goodput "
        f"{record['goodput']:.2f} in {record['active_s']:.0f} s")  # fmt: skip
    rows, wanted = run.rows(), whole.rows()
    assert sorted(rows) == list(range(1, STEPS + 1))
    for key in ("digest", "position", "epoch", "lr"):
        assert [rows[s][key] for s in sorted(rows)] == [wanted[s][key] for s in sorted(wanted)], key
    assert [rows[s]["loss"] for s in sorted(rows)] == pytest.approx([wanted[s]["loss"] for s in sorted(wanted)], 1e-5)
    states = [read_state(r.dir.path, committed(LocalStore(r.dir.path))[-1]) for r in (run, whole)]
    assert relative_l2(weights_of(states[0]), weights_of(states[1])) < 1e-5
