"""The whole table of shapes over 60 steps, against one worker at ZeRO stage 0. Too long for `make test`.

Adam's first step is g / (|g| + eps): an element whose gradient is as small as eps moves by what rounding makes of
it. With the default eps of 1e-8 there are such elements: one of them is most of the distance between two shapes,
at any stage. The table therefore uses 1e-6, and bounds every single tensor; `DEFAULT_EPS` shows the default.

Each case runs the real `build_rank` and `run_loop` on real process groups and records its deviations; at the end
they go to `build/exactness.json`, from which the figures in `docs/exactness.md` are taken.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_ft.config import Config
from tests.helpers.attempts import Attempt, Floats, prepare, relative_l2, train
from tests.helpers.configs import tiny_config, write_rows
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankServer

pytestmark = pytest.mark.exactness

NUM_STEPS = 60
REPORT = ROOT / "build" / "exactness.json"


@dataclass(frozen=True)
class Column:
    """What is trained, and how the data lies. The tiny model has no dropout of its own, an adapter may."""

    method: str
    dropout: float
    packing: bool
    dtype: str = "float32"
    eps: float = 1e-6

    def __str__(self) -> str:
        packing = "packed" if self.packing else "unpacked"
        return f"{self.method}, dropout {self.dropout}, {packing}, {self.dtype}, eps {self.eps}"


@dataclass(frozen=True)
class Shape:
    """How a run is laid out."""

    stage: int
    world_size: int
    micro_batch_size: int

    def __str__(self) -> str:
        return f"z{self.stage}x{self.world_size}m{self.micro_batch_size}"


METHODS = (("full", 0.0), ("lora", 0.0), ("lora", 0.1))
COLUMNS = [Column(method, dropout, packing) for (method, dropout), packing in product(METHODS, (False, True))]
REFERENCE = Shape(0, 1, 2)
SHAPES = [shape for shape in (Shape(*s) for s in product((0, 1, 2, 3), (1, 2, 3), (1, 2, 3))) if shape != REFERENCE]
BF16_COLUMNS = [Column("full", 0.0, True, "bfloat16"), Column("lora", 0.1, False, "bfloat16")]
DEFAULT_EPS = [Column("full", 0.0, True, eps=1e-8), Column("lora", 0.1, False, eps=1e-8)]
# Stage 0 runs as stage 1 in bfloat16. Six shapes a column, each size and stage in both.
FEW_SHAPES = [Shape(0, 1, 1), Shape(1, 2, 1), Shape(1, 3, 2), Shape(2, 2, 3), Shape(2, 3, 1), Shape(3, 3, 3)]
TABLE = [*product(COLUMNS, SHAPES), *product([*BF16_COLUMNS, *DEFAULT_EPS], FEW_SHAPES)]


@dataclass
class Deviation:
    """How far a case is from its reference, relative: worst step, all weights as one vector, worst tensor."""

    column: str
    shape: str
    loss: float
    weights: float
    tensor: float
    first_norm: float
    seconds: float


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table")
    write_rows(path / "train.jsonl", 8 * NUM_STEPS)
    return path


def make_config(data: Path, column: Column, shape: Shape, name: str) -> Config:
    return tiny_config(
        data,
        run__name=name,
        model__dtype=column.dtype,
        method__kind=column.method,
        method__lora_dropout=column.dropout,
        data__eval=None,
        data__packing=column.packing,
        zero__stage=shape.stage,
        cluster__num_workers=shape.world_size,
        train__micro_batch_size=shape.micro_batch_size,
        train__max_steps=NUM_STEPS,
        optimizer__eps=column.eps,
    )


Reference = tuple[dict[str, Any], Attempt, dict[str, Floats]]


@pytest.fixture(scope="module")
def reference(data: Path, ranks: RankServer) -> Callable[[Column], Reference]:
    """One worker at stage 0, once a column: what was prepared, the run, its weights."""
    found: dict[Column, Reference] = {}

    def get(column: Column) -> Reference:
        if column not in found:
            config = make_config(data, column, REFERENCE, f"reference-{COLUMN_NUMBERS[column]}")
            prepared = prepare(ranks, config)
            run = train(ranks, config, prepared=prepared)
            assert len(run.rows) == NUM_STEPS
            found[column] = (prepared, run, run.weights())
        return found[column]

    return get


COLUMN_NUMBERS = {column: number for number, column in enumerate([*COLUMNS, *BF16_COLUMNS, *DEFAULT_EPS])}


@pytest.fixture(scope="module")
def report() -> Iterator[list[Deviation]]:
    """Collects what the cases found; written even when some fail."""
    found: list[Deviation] = []
    began = time.monotonic()
    yield found
    figures = ("loss", "weights", "tensor", "first_norm")
    columns = {case.column: [c for c in found if c.column == case.column] for case in found}
    machine = {
        "processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "transformers", "peft")},
    }  # fmt: skip
    data = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "steps": NUM_STEPS,
        "num_cases": len(found),
        "is_whole_table": len(found) == len(TABLE),
        "seconds": round(time.monotonic() - began),
        "worst": {name: {f: max(getattr(c, f) for c in cases) for f in figures} for name, cases in columns.items()},
        "cases": [asdict(case) for case in found],
    }
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(data, indent=1) + "\n")


@pytest.mark.parametrize(("column", "shape"), TABLE, ids=str)
def test_every_shape_trains_what_one_worker_at_stage_0_trains(
    column: Column,
    shape: Shape,
    data: Path,
    reference: Callable[[Column], Reference],
    report: list[Deviation],
    ranks: RankServer,
) -> None:
    prepared, wanted, wanted_weights = reference(column)
    began = time.monotonic()
    config = make_config(data, column, shape, f"{COLUMN_NUMBERS[column]}-{shape}")
    run = train(ranks, config, prepared=prepared)
    found = measure(run, wanted, wanted_weights, column, shape, time.monotonic() - began)
    report.append(found)
    print(found)
    assert list(run.digests) == list(range(1, NUM_STEPS + 1))
    assert run.digests == wanted.digests
    if column.dtype == "bfloat16":
        assert found.loss < 5e-3
        return
    assert found.loss < 1e-5
    assert found.first_norm < 1e-6
    if column not in DEFAULT_EPS:
        assert found.weights < 1e-5
        assert found.tensor < 1e-5


def measure(
    run: Attempt, wanted: Attempt, wanted_weights: dict[str, Floats], column: Column, shape: Shape, seconds: float
) -> Deviation:
    weights = run.weights()
    one, two = (np.concatenate([w[name] for name in wanted_weights]) for w in (weights, wanted_weights))
    return Deviation(
        column=str(column),
        shape=str(shape),
        loss=max(abs(run.losses[step] / loss - 1) for step, loss in wanted.losses.items()),
        weights=relative_l2({"all": one}, {"all": two}),
        tensor=relative_l2(weights, wanted_weights),
        first_norm=abs(run.rows[0]["grad_norm"] / wanted.rows[0]["grad_norm"] - 1),
        seconds=round(seconds, 1),
    )
