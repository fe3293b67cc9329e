"""Every kind of fault, each in another shape of run, ends in what the undisturbed run gives. `make faults`.

Consumed samples are exactly equal. Where the sizes are, so are the bits of weights and optimizer state; where they
are not, loss and weights agree to 1e-5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, product
from pathlib import Path

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import read_state, relative_l2, weights_of
from tests.helpers.cluster import LoopbackCluster
from tests.helpers.faults import FAULTS, Scene
from tests.helpers.runs import Run

pytestmark = pytest.mark.faults

STEPS = 40
# At the rate of the smoke config rounding grows tenfold every five steps; no two world sizes would stay alike.
SETTINGS = ("train.max_steps=40", "optimizer.lr=1e-3", "checkpoint.every_steps=5", "failure.backoff_s=0.1")
METHODS = {"full": "{kind: full}", "lora": "{kind: lora, r: 8, lora_alpha: 16}"}


@dataclass(frozen=True)
class Shape:
    """What a run looks like: `size` workers, of which `least` must remain."""

    method: str
    stage: int
    size: int
    least: int

    @property
    def settings(self) -> tuple[str, ...]:
        """As overrides."""
        return (f"method={METHODS[self.method]}", f"zero.stage={self.stage}")

    def __str__(self) -> str:
        sizes = str(self.size) if self.size == self.least else f"{self.size} or {self.least}"
        return f"{self.method}, ZeRO {self.stage}, {sizes} workers"


def _shapes() -> dict[str, Shape]:
    """A shape for every fault: all pairs of method, stage and size come up."""
    here = cycle(product(METHODS, range(4), (2, 3)))
    on_nodes = cycle(zip("flflflfl", (2, 3, 1, 0, 3, 2, 0, 1), ((3, 2), (4, 3), (2, 1), (3, 2)) * 2, strict=True))
    shapes = {}
    for name, fault in FAULTS.items():
        if name == "below the minimum and back":
            shapes[name] = Shape("lora", 2, 3, 3)
        elif name == "node joins":
            shapes[name] = Shape("full", 3, 3, 2)
        elif fault.nodes:
            letter, stage, (size, least) = next(on_nodes)
            shapes[name] = Shape({"f": "full", "l": "lora"}[letter], stage, size, least)
        else:
            method, stage, size = next(here)
            shapes[name] = Shape(method, stage, size, size)
    return shapes


SHAPES = _shapes()


@dataclass
class References:
    """Undisturbed runs, each made once a session."""

    cli: str
    directory: Path
    address: str
    runs: dict[tuple[str, ...], Run] = field(default_factory=dict)

    def get(self, shape: Shape) -> Run:
        key = (*shape.settings, f"cluster.num_workers={shape.size}")
        if key not in self.runs:
            run = Run(self.cli, self.directory, self.address, f"whole-{len(self.runs)}", *SETTINGS, *key)
            code, result, err = run.finish()
            assert (code, result["attempts"]) == (0, 1), err
            self.runs[key] = run
        return self.runs[key]


@pytest.fixture(scope="module")
def references(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> References:
    return References(cli, tmp_path_factory.mktemp("undisturbed"), ray_address)


@pytest.fixture
def clusters() -> Iterator[Callable[[int], LoopbackCluster]]:
    made: list[LoopbackCluster] = []

    def make(head_cpus: int) -> LoopbackCluster:
        made.append(LoopbackCluster(head_cpus))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_leaves_no_trace_in_the_result(
    name: str,
    cli: str,
    tmp_path: Path,
    session_ray: tuple[str, int],
    clusters: Callable[[int], LoopbackCluster],
    references: References,
    say: Callable[[str], None],
) -> None:
    fault, shape = FAULTS[name], SHAPES[name]
    whole = references.get(shape)
    address, ray_pid, cluster = *session_ray, None
    if fault.nodes or shape.least != shape.size or name == "below the minimum and back":
        cluster = clusters(shape.size - 1)
        address, ray_pid = cluster.address, cluster.pid
    nodes = [cluster.add() for _ in range(fault.nodes)] if cluster else []
    sizes = f"cluster.num_workers=[{shape.least},{shape.size}]"
    settings = (*SETTINGS, *shape.settings, sizes, *fault.settings)
    began = time.monotonic()
    run = Run(cli, tmp_path, address, "hurt", *settings, env=fault.env(tmp_path))
    try:
        fault.strike(Scene(run, ray_pid, cluster, nodes))
        if fault.resume:
            run.process.communicate(timeout=200)
            run = Run(cli, tmp_path, address, "hurt", *settings, "--resume")
        code, result, err = run.finish(400)
    finally:
        run.process.kill()
    say(f"{name:40} {shape!s:36} {time.monotonic() - began:5.0f} s  {result['attempts']} attempts")
    assert (code, result["state"]) == (0, "completed"), (result["error"], err)
    assert result["attempts"] > 1 or fault.said == "is left out", err
    assert fault.said in err
    _check_equal(run, whole)
    repeated = len(run.all_rows()) - STEPS
    assert fault.lost is None or repeated <= fault.lost, f"{repeated} steps were made again"


def _check_equal(run: Run, whole: Run) -> None:
    rows, wanted = run.rows(), whole.rows()
    assert sorted(rows) == list(range(1, STEPS + 1))
    for key in ("digest", "position", "epoch", "trained_tokens", "lr"):
        assert [rows[s][key] for s in sorted(rows)] == [wanted[s][key] for s in sorted(wanted)], key
    if {row["world_size"] for row in run.all_rows()} == {wanted[1]["world_size"]}:
        assert [rows[s]["loss"] for s in sorted(rows)] == [wanted[s]["loss"] for s in sorted(wanted)]
        assert run.state() == whole.state()
        return
    assert [rows[s]["loss"] for s in sorted(rows)] == pytest.approx([wanted[s]["loss"] for s in sorted(wanted)], 1e-5)
    assert relative_l2(_weights(run), _weights(whole)) < 1e-5


def _weights(run: Run) -> dict[str, object]:
    return weights_of(read_state(run.dir.path, committed(LocalStore(run.dir.path))[-1]))
