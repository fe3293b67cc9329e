"""The table of shapes for preference objectives and distillation, against one worker at ZeRO stage 0, in SFT's bounds.

Each objective runs at every shape, in full on packed rows and with LoRA on single ones, and at a few shapes the other
way round; eps as in `test_table.py`. A run that stops after each step and goes on elsewhere ends alike.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from dist_ft.config import Config
from tests.helpers.attempts import Attempt, prepare, relative_l2, train
from tests.helpers.configs import preference_config
from tests.helpers.ranks import RankServer
from tests.helpers.teacher import make_teacher

pytestmark = pytest.mark.exactness

NUM_STEPS = 8
OBJECTIVES = {
    "dpo": {"kind": "dpo", "sft_weight": 0.2}, "kto": {"kind": "kto"}, "orpo": {"kind": "orpo"},
    "distill": {"kind": "distill", "top_k": 16, "temperature": 2.0, "ce_weight": 0.2},
}  # fmt: skip
REFERENCE = (0, 1, 2)
SHAPES = [shape for shape in product((0, 1, 2, 3), (1, 2, 3), (1, 2)) if shape != REFERENCE]
FEW_SHAPES = [(0, 3, 2), (1, 2, 1), (2, 3, 1), (3, 2, 2), (3, 3, 1)]
Column = tuple[str, str, bool]
"""Objective, method, whether rows are packed."""
TABLE = [
    *product(product(OBJECTIVES, ["full"], [True]), SHAPES), *product(product(OBJECTIVES, ["lora"], [False]), SHAPES),
    *product(product(OBJECTIVES, ["full"], [False]), FEW_SHAPES),
    *product(product(OBJECTIVES, ["lora"], [True]), FEW_SHAPES),
]  # fmt: skip


def config_of(data: Path, column: Column, shape: tuple[int, int, int], name: str) -> Config:
    objective, method, packing = column
    stage, size, micro = shape
    (data / objective).mkdir(exist_ok=True)
    teacher = {"teacher": str(data / "teacher")} if objective == "distill" else {}
    return preference_config(
        data / objective, OBJECTIVES[objective] | teacher, run__name=name, method__kind=method, data__eval=None,
        data__packing=packing, zero__stage=stage, cluster__num_workers=size, train__micro_batch_size=micro,
        train__max_steps=NUM_STEPS, optimizer__eps=1e-6, optimizer__lr=1e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preferences")
    make_teacher(directory / "teacher")
    return directory


@pytest.fixture(scope="module")
def reference(data: Path, ranks: RankServer) -> Callable[[Column], Attempt]:
    """One worker at stage 0, once a column."""
    found: dict[Column, Attempt] = {}

    def get(column: Column) -> Attempt:
        if column not in found:
            config = config_of(data, column, REFERENCE, "-".join(map(str, column)))
            found[column] = train(ranks, config, prepared=prepare(ranks, config))
        return found[column]

    return get


def assert_alike(losses: dict[int, float], run: Attempt, wanted: Attempt) -> None:
    assert losses == pytest.approx(wanted.losses, rel=1e-5)
    assert relative_l2(run.weights(), wanted.weights()) < 1e-5


@pytest.mark.parametrize(("column", "shape"), TABLE, ids=str)
def test_every_shape_trains_what_one_worker_at_stage_0_trains(
    column: Column,
    shape: tuple[int, int, int],
    data: Path,
    reference: Callable[[Column], Attempt],
    ranks: RankServer,
) -> None:
    config = config_of(data, column, shape, "-".join(map(str, (*column, *shape))))
    run = train(ranks, config, prepared=prepare(ranks, config))
    assert run.digests == reference(column).digests
    assert_alike(run.losses, run, reference(column))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_stops_after_every_step_goes_on_anywhere(
    objective: str, data: Path, reference: Callable[[Column], Attempt], ranks: RankServer
) -> None:
    column = (objective, "full", True)
    losses: dict[int, float] = {}
    run = None
    for step, shape in zip(range(1, NUM_STEPS + 1), SHAPES[::2], strict=False):
        config = config_of(data, column, shape, f"{objective}-stops")
        start = run.manifests[max(run.manifests)] if run else None
        run = train(ranks, config, prepared=prepare(ranks, config), start=start, stop_after=1)
        losses |= run.losses
        assert max(losses) == step
    assert run is not None
    assert_alike(losses, run, reference(column))
