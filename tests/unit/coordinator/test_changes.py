"""Changes of a run at work: another size, a failure, a step that is left out, a stop."""

from __future__ import annotations

from pathlib import Path

from dist_ft.coordinator.sizing import ClusterView
from dist_ft.messages import (
    Heartbeat,
    Leaving,
    RankDone,
    RankFailed,
    RankStarted,
)
from dist_ft.run.place import open_run
from dist_ft.storage.publish import read_json
from tests.helpers.simulated_run import SimulatedRun


def _drained(run: SimulatedRun) -> None:
    """The node of rank 1 gives notice behind step 5; the ranks save and end."""
    run.open()
    run.step(5)
    assert run.coordinator.choose_size(ClusterView(1, ("10.0.0.9",)), 100.0) is None
    assert [run.send(rank, Heartbeat()).stop for rank in range(2)] == [True, True]
    run.commit(6)


def test_a_group_that_leaves_a_machine_saves_first_and_keeps_its_places(run: SimulatedRun) -> None:
    _drained(run)
    assert run.send(0, RankDone("stopped", 6)).hold
    assert run.coordinator.choose_size(ClusterView(1, ("10.0.0.9",)), 101.0) is None  # rank 1 is not there yet
    assert run.send(1, RankDone("stopped", 6)).hold
    assert run.coordinator.outcome() is None
    assert run.coordinator.choose_size(ClusterView(2), 102.0) == 2
    assert run.coordinator.choose_size(ClusterView(2), 103.0) == 2  # the answer may have been lost
    assert run.coordinator.choose_size(ClusterView(2, formed_at=7.0), 104.0) is None  # formed anew, not yet opened
    spec = run.open(world_size=2)
    assert spec.start_checkpoint == "checkpoints/step-00000006-a0001/manifest.json"
    assert not run.send(0, Heartbeat()).stop
    assert [entry["step"] for entry in run.events("resizing")] == [5]
    assert not run.events("recovering")


def test_a_group_that_loses_its_machine_after_it_was_drained_has_not_failed(run: SimulatedRun) -> None:
    _drained(run)
    for rank in range(2):
        run.send(rank, RankDone("stopped", 6))
    assert run.coordinator.decide("worker died", ["10.0.0.9"], 103.0).is_restart
    assert not run.events("recovering")


def test_a_stop_during_a_drain_is_a_stop(run: SimulatedRun) -> None:
    _drained(run)
    run.coordinator.request_stop("SIGTERM")
    for rank in range(2):
        assert not run.send(rank, RankDone("stopped", 6)).hold
    assert run.coordinator.outcome() == "stopped"


def test_a_rank_that_is_told_to_end_takes_the_group_along_behind_a_checkpoint(run: SimulatedRun) -> None:
    run.open()
    run.step(5)
    assert run.send(1, Leaving("SIGTERM")).stop
    assert "rank 1 was told to end (SIGTERM)" in run.events("resizing")[0]["reason"]
    assert read_json(run.dir.run_json)["state"] == "resizing"


def test_a_step_that_is_left_out_stays_left_out(tmp_path: Path) -> None:
    run = SimulatedRun(open_run(tmp_path / "run"), failure={"bad_numbers": "skip_batch"})
    run.open()
    run.send(1, RankFailed({"type": "DivergedError", "message": "loss nan"}, step=8))
    assert run.coordinator.decide("", [], 100.0).skip_step == 8
    assert run.open().skipped_steps == (8,)
    run.restart()
    assert run.open().skipped_steps == (8,)


def test_what_follows_a_failure_is_said_once_and_alike(run: SimulatedRun) -> None:
    run.open()
    run.step(3)
    first = run.coordinator.decide("worker died", [], 100.0)
    assert run.coordinator.decide("another worker died", [], 101.0) == first
    assert len(run.events("recovering")) == 1
    assert run.events("recovering")[0]["cause"]["type"] == "WorkerCrashError"


def test_a_lost_machine_is_the_cause_whatever_its_peers_say(run: SimulatedRun) -> None:
    run.open()
    run.send(0, RankFailed({"type": "WorkerCrashError", "message": "connection closed by peer"}))
    run.coordinator.decide("worker died", ["10.0.0.9"], 100.0)
    assert run.events("recovering")[0]["cause"]["type"] == "NodeLostError"


def test_a_stop_request_file_reaches_every_rank(run: SimulatedRun) -> None:
    run.open()
    run.step(1)
    run.dir.stop_request.write_text("{}")
    assert not run.send(0, Heartbeat()).stop
    for _ in range(3):
        run.tick()
    assert [run.send(rank, Heartbeat()).stop for rank in range(2)] == [True, True]
    assert read_json(run.dir.run_json)["state"] == "stopping"
    assert len(run.events("stop_requested")) == 1


def test_a_stop_before_the_ranks_are_there_is_not_forgotten(run: SimulatedRun) -> None:
    run.open(start=False)
    run.coordinator.request_stop("SIGTERM")
    for rank in range(2):
        assert run.send(rank, RankStarted(1, "10.0.0.1")).stop
    assert read_json(run.dir.run_json)["state"] == "stopping"
    assert run.events("stop_requested")[0]["reason"] == "SIGTERM"


def test_a_stop_after_the_end_is_too_late(run: SimulatedRun) -> None:
    run.open()
    run.coordinator.finish("completed", {})
    run.coordinator.request_stop("SIGTERM")
    assert read_json(run.dir.run_json)["state"] == "completed"
