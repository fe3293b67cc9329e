"""A run takes machines that join and leaves machines that give notice, in mid-epoch and without losing a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cluster import LoopbackCluster
from tests.helpers.runs import Run

STEPS = 60
# At the rate of the smoke config rounding grows tenfold every five steps; no two world sizes would stay alike.
SETTINGS = (f"train.max_steps={STEPS}", "optimizer.lr=1e-3", "checkpoint.every_steps=25", "cluster.num_workers=[1,2]",
            "cluster.grow_after_s=1", "cluster.grow_if_it_pays=false")  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cli: str, tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Run:
    run = Run(cli, tmp_path_factory.mktemp("undisturbed"), ray_address, "whole", *SETTINGS, "cluster.num_workers=2")
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 1), err
    return run


@pytest.fixture
def cluster() -> Iterator[LoopbackCluster]:
    cluster = LoopbackCluster()
    yield cluster
    cluster.close()


def test_a_run_grows_onto_a_node_that_joins(
    cli: str, tmp_path: Path, cluster: LoopbackCluster, undisturbed: Run
) -> None:
    run = Run(cli, tmp_path, cluster.address, "grown", *SETTINGS)
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.add()
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 2), err
    assert "room for 2 workers" in err
    _check(run, undisturbed, sizes=(1, 2))


def test_a_run_leaves_a_node_that_gives_notice(
    cli: str, tmp_path: Path, cluster: LoopbackCluster, undisturbed: Run
) -> None:
    node = cluster.add()
    run = Run(cli, tmp_path, cluster.address, "shrunk", *SETTINGS)
    run.wait_for(lambda record: record["step"] >= 8)
    cluster.drain(node)
    code, result, err = run.finish()
    assert (code, result["attempts"]) == (0, 2), err
    assert "will leave the cluster" in err
    _check(run, undisturbed, sizes=(2, 1))


def _check(run: Run, whole: Run, sizes: tuple[int, int]) -> None:
    """The sizes are as told, no step was lost, and the result is the undisturbed run's."""
    rows, wanted = run.rows(), whole.rows()
    assert (rows[1]["world_size"], rows[STEPS]["world_size"]) == sizes
    assert [row["step"] for row in run.all_rows()] == list(range(1, STEPS + 1))  # none was made twice
    assert not run.events("recovering")
    assert {s: r["digest"] for s, r in rows.items()} == {s: r["digest"] for s, r in wanted.items()}
    assert {s: r["loss"] for s, r in rows.items()} == pytest.approx({s: r["loss"] for s, r in wanted.items()}, rel=1e-5)
