"""Attempts: what ranks are told, what they start from, and what a zombie may not do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import committed, read_attempts
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.errors import CheckpointError, StaleAttemptError
from dist_ft.layout import slices_name
from dist_ft.messages import (
    EvalDone,
    Heartbeat,
    RankDone,
    RankFailed,
    RendezvousOpen,
    Reply,
    Staged,
    StepDone,
)
from dist_ft.metric_rows import EvalRow
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import ShardSize
from dist_ft.slices import WrittenFile
from dist_ft.storage.publish import read_json
from tests.helpers.rows import last_rows
from tests.helpers.simulated_run import ENDED, INPUTS, MARK, RUN_ID, SPLIT, SimulatedRun, run_config


def test_an_attempt_tells_the_ranks_what_preparation_found(run: SimulatedRun) -> None:
    spec = run.open()
    assert (spec.run_id, spec.attempt, spec.run_dir) == (RUN_ID, 1, str(run.dir.path))
    assert (spec.inputs.splits, spec.inputs.eval_split) == ((SPLIT,), replace(SPLIT, key="eval"))
    assert spec.inputs.fingerprint == MARK
    assert (spec.inputs.max_steps, spec.inputs.num_positions, spec.start_checkpoint) == (60, 480, None)
    assert spec.config == run_config()


def test_a_later_attempt_is_told_the_sizes_of_shards_that_were_made_meanwhile(tmp_path: Path) -> None:
    splits = (replace(SPLIT, num_shards=3, counts=None), SPLIT)
    run = SimulatedRun(open_run(tmp_path / "run"), inputs=replace(INPUTS, splits=splits))
    assert run.open().inputs.splits[0].made_sizes == ()
    run.coordinator.add_sizes([ShardSize(0, 2, 7)])
    run.coordinator.add_sizes([ShardSize(0, 0, 5)])
    assert [split.made_sizes for split in run.open().inputs.splits] == [(5, None, 7), ()]


def test_every_rank_learns_where_rank_0_listens(run: SimulatedRun) -> None:
    run.open()
    assert run.send(1, Heartbeat()).rendezvous is None
    run.send(0, RendezvousOpen("10.0.0.1", 4242))
    assert run.send(1, Heartbeat()).rendezvous == ("10.0.0.1", 4242)


def test_an_attempt_knows_what_was_measured_before_its_start(run: SimulatedRun) -> None:
    run.open()
    for step, loss in [(0, 9.0), (10, 5.0), (20, 4.0)]:
        run.send(0, EvalDone(EvalRow(step, 1, {"eval_loss": loss})))
        if step == 10:
            run.commit(step)
    run.restart()  # another driver takes over; what was measured at step 20 is measured again
    assert list(run.open().evaluations) == [
        EvalRow(0, 1, {"eval_loss": 9.0}),
        EvalRow(10, 1, {"eval_loss": 5.0}),
    ]


@pytest.mark.parametrize(("run_id", "attempt"), [(RUN_ID, 1), (RUN_ID, 3), ("another", 2)])
def test_a_message_of_another_attempt_is_refused_and_changes_nothing(
    run: SimulatedRun, run_id: str, attempt: int
) -> None:
    run.open()
    run.commit(10)
    run.open()
    before = {path: path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file()}
    for message in (
        StepDone(run.row(11), []),
        RankFailed(ENDED),
        RankDone("completed", 60),
        Staged(20, WrittenFile("", 0, ""), None),
    ):
        with pytest.raises(StaleAttemptError, match="current attempt"):
            run.send(0, message, attempt, run_id)
    assert before == {path: path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file()}
    assert run.coordinator.outcome() is None


def test_what_an_older_driver_commits_later_does_not_count(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    zombie, zombie_spec = run.coordinator, run.spec
    run.restart()
    run.open()
    current, current_spec = run.coordinator, run.spec
    run.coordinator, run.spec = zombie, zombie_spec
    with suppress(StaleAttemptError):
        run.commit(20)
    run.coordinator, run.spec = current, current_spec
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1)]
    run.commit(20)
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1), (20, 2)]


def test_an_older_driver_stops_writing_the_books_once_a_newer_attempt_exists(run: SimulatedRun) -> None:
    run.open()
    zombie, zombie_spec = run.coordinator, run.spec
    run.restart()
    run.open()
    run.step(1, loss=2.0)
    run.coordinator, run.spec = zombie, zombie_spec
    run.tick()
    assert run.coordinator.outcome() == "failed"
    with suppress(StaleAttemptError):
        assert run.step(1, loss=3.0).abort is not None
    assert last_rows(run.dir.metrics)[1]["loss"] == 2.0
    assert read_json(run.dir.run_json)["attempt"] == 2


@pytest.fixture(params=["same coordinator", "new coordinator"])
def again(request: pytest.FixtureRequest) -> Callable[[SimulatedRun], Any]:
    def reopen(run: SimulatedRun) -> Any:
        if request.param == "new coordinator":
            run.restart()
        return run.open()

    return reopen


def test_a_further_attempt_starts_from_the_newest_checkpoint(
    run: SimulatedRun, again: Callable[[SimulatedRun], Any]
) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.step(27)
    spec = again(run)
    assert spec.attempt == 2
    assert spec.start_checkpoint == "checkpoints/step-00000020-a0001/manifest.json"
    assert Manifest.decode(run.store.read(spec.start_checkpoint)).step == 20
    assert [(a.number, a.start_step, a.start_attempt) for a in read_attempts(run.store)] == [
        (1, 0, 0),
        (2, 20, 1),
    ]
    assert read_json(run.dir.run_json)["step"] == 20
    assert run.send(0, Heartbeat()) == Reply()
    assert run.coordinator.outcome() is None


def test_a_further_attempt_without_a_checkpoint_starts_anew(
    run: SimulatedRun, again: Callable[[SimulatedRun], Any]
) -> None:
    run.open()
    run.stage(0, 10)
    spec = again(run)
    assert (spec.attempt, spec.start_checkpoint) == (2, None)
    # What the dead attempt had staged does not complete a checkpoint of the new one.
    run.stage(1, 10)
    assert committed(run.store) == []


def test_a_damaged_checkpoint_is_passed_over_loudly(run: SimulatedRun, again: Callable[[SimulatedRun], Any]) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.damage(20, 1)
    spec = again(run)
    assert spec.start_checkpoint == "checkpoints/step-00000010-a0001/manifest.json"
    (entry,) = run.events("checkpoint_damaged")
    assert entry["step"] == 20
    assert slices_name(0, 2) in entry["error"]
    run.commit(20)
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1), (20, 2)]


def test_with_all_checkpoints_damaged_nothing_starts(run: SimulatedRun, again: Callable[[SimulatedRun], Any]) -> None:
    run.open()
    for step in (10, 20):
        run.commit(step)
        run.damage(step, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        again(run)
    assert len(read_attempts(run.store)) == 1
    assert len(run.events("checkpoint_damaged")) == 2


@pytest.mark.parametrize("data", [b"", b"{", b'{"format_version": 2}'])
def test_with_all_manifests_unreadable_nothing_starts(
    run: SimulatedRun, again: Callable[[SimulatedRun], Any], data: bytes
) -> None:
    run.open()
    run.commit(10)
    (run.dir.checkpoint(10, 1) / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        again(run)
