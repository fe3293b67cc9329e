"""Commits: a checkpoint exists once all ranks have staged it, and saves may fail."""

from __future__ import annotations

import pytest

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import verify_files
from dist_ft.layout import slices_name
from dist_ft.messages import (
    Heartbeat,
)
from tests.helpers.simulated_run import MARK, PARAMS, RUN_ID, SimulatedRun, full_disk


def test_a_checkpoint_exists_once_all_ranks_have_staged_it(run: SimulatedRun) -> None:
    run.open()
    assert run.stage(0, 10).committed_step == 0
    assert committed(run.store) == []
    assert run.stage(1, 10).committed_step == 10
    (manifest,) = committed(run.store)
    assert (manifest.run_id, manifest.step, manifest.attempt, manifest.world_size) == (RUN_ID, 10, 1, 2)
    assert (manifest.cursor.position, manifest.fingerprint, manifest.params) == (80, MARK, PARAMS)
    assert [file.name for file in manifest.files] == [slices_name(0, 2), slices_name(1, 2)]
    verify_files(run.store, manifest)
    assert run.send(0, Heartbeat()).committed_step == 10
    assert [(entry["step"], entry["attempt"]) for entry in run.events("commit")] == [(10, 1)]


def test_ranks_may_stage_in_any_order_and_steps_may_overlap(run: SimulatedRun) -> None:
    run.open(world_size=3)
    for rank, step in [(2, 10), (0, 20), (1, 10), (2, 20), (0, 10), (1, 20)]:
        run.stage(rank, step)
    assert [m.step for m in committed(run.store)] == [10, 20]


@pytest.mark.parametrize(
    ("start", "end", "message"), [(2, 3, "missing"), (0, 3, "stored twice"), (1, 4, "elements stored of")]
)
def test_elements_missing_or_doubled_end_the_attempt_without_a_checkpoint(
    run: SimulatedRun, start: int, end: int, message: str
) -> None:
    run.open()
    run.stage(0, 10, 0, 1)
    for reply in (run.stage(1, 10, start, end), run.send(0, Heartbeat())):
        assert reply.abort is not None
        assert reply.committed_step == 0
    assert committed(run.store) == []
    assert not (run.dir.checkpoint(10, 1) / "manifest.json").exists()
    assert run.coordinator.outcome() == "failed"
    (failure,) = run.coordinator.status().failures
    assert failure.type == "CheckpointError"
    assert run.events("rank_failed")[0]["message"] == failure.message


def test_a_gap_is_named(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 10, 0, 1)
    run.stage(1, 10, 2, 3)
    assert "elements 1..1 are missing" in run.coordinator.status().failures[0].message


def test_a_file_of_another_kind_ends_the_attempt(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 10)
    path = run.dir.checkpoint(10, 1) / slices_name(0, 2)
    path.write_bytes(b"not a tensor file")
    assert run.stage(1, 10).abort is not None
    assert committed(run.store) == []


def test_a_staged_file_that_cannot_be_seen_makes_no_checkpoint_and_ends_nothing(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 10)
    (run.dir.checkpoint(10, 1) / slices_name(0, 2)).unlink()
    assert run.stage(1, 10).abort is None
    assert [entry["step"] for entry in run.events("save_failed")] == [10]
    run.commit(20)
    assert [m.step for m in committed(run.store)] == [20]


def test_a_save_that_fails_is_left_out_on_all_ranks(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 10)
    run.send(1, full_disk(1, 10))
    run.send(0, full_disk(0, 10))
    assert [entry["step"] for entry in run.events("save_failed")] == [10]
    run.commit(20)
    assert [m.step for m in committed(run.store)] == [20]
    assert run.coordinator.outcome() is None


@pytest.mark.parametrize(("steps", "is_last"), [((10, 20, 30), False), ((10,), True)])
def test_saves_that_keep_failing_end_the_run(run: SimulatedRun, steps: tuple[int, ...], is_last: bool) -> None:
    run.open()
    for step in steps:
        assert run.coordinator.outcome() is None
        run.send(0, full_disk(0, step, is_last))
    assert run.send(1, Heartbeat()).abort is not None
    (failure,) = run.coordinator.status().failures
    assert failure.type == "StorageError"
    assert "No space left" in failure.message
    assert not run.coordinator.decide("", [], run.now).is_restart


def test_a_save_that_succeeds_forgets_those_that_failed(run: SimulatedRun) -> None:
    run.open()
    for step in (10, 20):
        run.send(0, full_disk(0, step))
    run.commit(30)
    for step in (40, 50):
        run.send(0, full_disk(0, step))
    assert run.coordinator.outcome() is None


def test_a_last_checkpoint_that_cannot_be_committed_ends_the_run(run: SimulatedRun) -> None:
    run.open()
    run.stage(0, 30, is_last=True)
    (run.dir.checkpoint(30, 1) / slices_name(0, 2)).unlink()
    assert run.stage(1, 30, is_last=True).abort is not None  # else the ranks would wait for it
    assert run.coordinator.status().failures[0].type == "StorageError"


def test_a_checkpoint_is_never_replaced(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    manifest = (run.dir.checkpoint(10, 1) / "manifest.json").read_bytes()
    assert run.commit(10).abort is not None
    assert (run.dir.checkpoint(10, 1) / "manifest.json").read_bytes() == manifest
