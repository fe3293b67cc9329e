"""A run that is stopped and goes on ends as if nothing had happened, wherever and however often it stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.config import Config
from dist_ft.config.training_sections import ScheduleConfig
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import Attempt, differing, prepare, read_state, relative_l2, train
from tests.helpers.configs import tiny_config, write_rows
from tests.helpers.group import Group, run_group
from tests.helpers.ranks import RankServer
from tests.helpers.rows import last_rows

NUM_STEPS = 6
KEEP_ALL = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 99}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"method__kind": "full"},
    "lora, packed, dropout": {"method__kind": "lora", "method__lora_dropout": 0.1, "data__packing": True},
}


@dataclass
class Whole:
    """An undisturbed run with a checkpoint a step."""

    data: Path
    changes: dict[str, Any]
    group: Group


@pytest.fixture(scope="module", params=list(VARIANTS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starter: str) -> Whole:
    data = tmp_path_factory.mktemp("whole")
    changes = {**VARIANTS[request.param], **KEEP_ALL}
    group = run_group(tiny_config(data, **changes), starter)
    assert group.outcome == "completed", group.errors
    assert [m.step for m in committed(LocalStore(group.run_dir.path))] == list(range(1, NUM_STEPS + 1))
    return Whole(data, changes, group)


@pytest.mark.parametrize("stopped_after", range(1, NUM_STEPS))
def test_resume_after_every_step_is_bitwise(stopped_after: int, whole: Whole, tmp_path: Path, starter: str) -> None:
    config = tiny_config(whole.data, **whole.changes, run__output_dir=str(tmp_path))
    run_dir = tmp_path / whole.group.run_dir.path.name
    shutil.copytree(whole.group.run_dir.path, run_dir)
    for manifest in committed(LocalStore(run_dir)):
        if manifest.step > stopped_after:
            shutil.rmtree(run_dir / manifest.directory)
    resumed = run_group(config, starter)
    assert resumed.outcome == "completed", resumed.errors
    rows = last_rows(resumed.run_dir.metrics)
    assert [rows[step]["attempt"] for step in rows] == [1] * stopped_after + [2] * (NUM_STEPS - stopped_after)
    assert resumed.losses == whole.group.losses
    assert resumed.digests == whole.group.digests
    _same_rows(rows, last_rows(whole.group.run_dir.metrics))
    for step in range(stopped_after + 1, NUM_STEPS + 1):
        states = [_state(group, step) for group in (resumed, whole.group)]
        assert differing(*states) == [], f"after step {step}"


def _state(group: Group, step: int) -> Any:
    store = LocalStore(group.run_dir.path)
    return read_state(group.run_dir.path, next(m for m in committed(store) if m.step == step))


def _same_rows(rows: dict[int, dict[str, Any]], wanted: dict[int, dict[str, Any]]) -> None:
    for key in ("position", "epoch", "lr", "grad_norm", "trained_tokens", "tokens"):
        assert {step: row[key] for step, row in rows.items()} == {step: row[key] for step, row in wanted.items()}


# What follows: 22 sequences, two epochs, steps of 8. Step 3 crosses into the second epoch, step 6 takes the 4 left.
NUM_ROWS = 22


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("epochs")
    write_rows(path / "train.jsonl", NUM_ROWS)
    return path


def epochs_config(data: Path, name: str, stage: int, size: int, **changes: Any) -> Config:
    return tiny_config(
        data,
        run__name=name,
        method__kind="lora",
        method__lora_dropout=0.1,
        data__eval=None,
        zero__stage=stage,
        cluster__num_workers=size,
        optimizer__eps=1e-6,  # see test_partly_trained.py: the default lets Adam magnify rounding noise
        **{"train__max_steps": None, "train__epochs": 2.0, **KEEP_ALL, **changes},
    )


@pytest.fixture(scope="module")
def prepared(data: Path, ranks: RankServer) -> dict[str, Any]:
    found = prepare(ranks, epochs_config(data, "epochs", 2, 2))
    assert (found["max_steps"], found["num_positions"]) == (NUM_STEPS, 2 * NUM_ROWS)
    return found


@pytest.fixture(scope="module")
def two_epochs(data: Path, prepared: dict[str, Any], ranks: RankServer) -> Attempt:
    run = train(ranks, epochs_config(data, "epochs", 2, 2), prepared=prepared)
    assert [row["position"] for row in run.rows] == [8, 16, 24, 32, 40, 44]
    assert [row["epoch"] for row in run.rows] == [0, 0, 1, 1, 1, 2]
    assert sum(row["trained_tokens"] for row in run.rows) == 2 * prepared["splits"][0]["counts"]["num_trained_tokens"]
    return run


def check_equal(run: Attempt, wanted: Attempt, is_bitwise: bool) -> None:
    """Compares the steps of `run`, which may have begun later, and the state at its end."""
    steps = list(run.losses)
    assert steps
    assert run.digests == {step: wanted.digests[step] for step in steps}
    losses = {step: wanted.losses[step] for step in steps}
    last = max(steps)
    if is_bitwise:
        assert run.losses == losses
        assert differing(run.state(last), wanted.state(last)) == []
    else:
        assert run.losses == pytest.approx(losses, rel=1e-5)
        assert relative_l2(run.weights(), wanted.weights()) < 1e-5


@pytest.mark.parametrize(
    ("stopped_after", "stage", "size"),
    [(3, 0, 1), (3, 1, 3), (4, 3, 3), (4, 2, 2), (5, 3, 1), (5, 0, 3), (5, 2, 2)],
)
def test_resume_in_the_second_epoch_and_in_the_short_last_step(
    stopped_after: int,
    stage: int,
    size: int,
    data: Path,
    prepared: dict[str, Any],
    two_epochs: Attempt,
    ranks: RankServer,
) -> None:
    config = epochs_config(data, "epochs", stage, size)
    run = train(ranks, config, prepared=prepared, start=two_epochs.manifests[stopped_after])
    assert run.outcome == "completed"
    assert list(run.losses) == list(range(stopped_after + 1, NUM_STEPS + 1))
    check_equal(run, two_epochs, is_bitwise=(stage, size) == (2, 2))
    end = run.manifests[NUM_STEPS]
    assert (end.cursor.epoch, end.cursor.position) == (2, 2 * NUM_ROWS)


@pytest.mark.parametrize("shapes", [[(2, 2), (2, 2)], [(3, 3), (0, 1)], [(0, 1), (3, 2)]], ids=str)
def test_a_run_resumed_twice(
    shapes: list[tuple[int, int]], data: Path, prepared: dict[str, Any], two_epochs: Attempt, ranks: RankServer
) -> None:
    first, second = (epochs_config(data, "epochs", *shape) for shape in shapes)
    middle = train(ranks, first, prepared=prepared, start=two_epochs.manifests[2], stop_after=2)
    assert middle.outcome == "stopped"
    assert list(middle.losses) == [3, 4]
    end = train(ranks, second, prepared=prepared, start=middle.manifests[4])
    assert list(end.losses) == [5, 6]
    chain = [(m.step, m.attempt) for m in committed(LocalStore(end.run_dir))]
    assert chain == [(1, 1), (2, 1), (3, middle.number), (4, middle.number), (5, end.number), (6, end.number)]
    is_bitwise = set(shapes) == {(2, 2)}
    for run in (middle, end):
        assert run.digests == {step: two_epochs.digests[step] for step in run.losses}
        losses = {step: two_epochs.losses[step] for step in run.losses}
        assert run.losses == (losses if is_bitwise else pytest.approx(losses, rel=1e-5))
    check_equal(end, two_epochs, is_bitwise)


@pytest.fixture(scope="module")
def constant_rate(data: Path, ranks: RankServer) -> Callable[..., tuple[Config, dict[str, Any]]]:
    """Makes configs whose rate does not depend on the length of the run, and prepares them."""

    def make(name: str, stage: int, size: int, **changes: Any) -> tuple[Config, dict[str, Any]]:
        schedule = ScheduleConfig(kind="constant", warmup_ratio=0.0)
        config = epochs_config(data, name, stage, size, **changes).model_copy(update={"schedule": schedule})
        return config, prepare(ranks, config)

    return make


@pytest.fixture(scope="module")
def five_and_three(
    constant_rate: Callable[..., tuple[Config, dict[str, Any]]], ranks: RankServer
) -> tuple[Attempt, Attempt]:
    """A run of five steps, and one that ended after three."""
    config, prepared = constant_rate("five", 2, 2, train__max_steps=5)
    five = train(ranks, config, prepared=prepared)
    config, prepared = constant_rate("longer", 2, 2, train__max_steps=3)
    three = train(ranks, config, prepared=prepared)
    assert three.outcome == "completed"
    assert three.losses == {step: five.losses[step] for step in (1, 2, 3)}
    return five, three


@pytest.mark.parametrize(("stage", "size"), [(3, 3), (0, 1), (2, 2)])
def test_a_finished_run_goes_on_with_more_steps_at_another_shape(
    stage: int,
    size: int,
    five_and_three: tuple[Attempt, Attempt],
    constant_rate: Callable[..., tuple[Config, dict[str, Any]]],
    ranks: RankServer,
) -> None:
    five, three = five_and_three
    config, prepared = constant_rate("longer", stage, size, train__max_steps=5)
    longer = train(ranks, config, prepared=prepared, start=three.manifests[3])
    assert list(longer.losses) == [4, 5]
    check_equal(longer, five, is_bitwise=(stage, size) == (2, 2))


def test_a_longer_run_starts_before_a_short_last_step(data: Path, starter: str) -> None:
    """One epoch is 22 sequences, so its third step takes 6; of two epochs the third step takes 8."""
    first = run_group(epochs_config(data, "stretched", 2, 2, train__epochs=1.0), starter)
    assert [row["position"] for row in last_rows(first.run_dir.metrics).values()] == [8, 16, 22]
    config = epochs_config(data, "stretched", 3, 1, train__epochs=2.0)
    second = run_group(config, starter)
    assert second.outcome == "completed"
    rows = last_rows(second.run_dir.metrics)
    assert [row["position"] for row in rows.values()] == [8, 16, 24, 32, 40, 44]
    assert [row["attempt"] for row in rows.values()] == [1, 1, 2, 2, 2, 2]
    whole = run_group(epochs_config(data, "stretched-whole", 2, 2, train__epochs=2.0), starter)
    assert second.digests == whole.digests
