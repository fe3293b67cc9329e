"""Ranks without progress: who is asked, who is named, and who is not blamed."""

from __future__ import annotations

import pytest

from dist_ft.messages import (
    Heartbeat,
    Located,
    PhaseChanged,
    RankDone,
    Whereabouts,
)
from tests.helpers.simulated_run import SimulatedRun


def test_a_rank_without_progress_is_looked_at_and_named_and_all_are_ended(run: SimulatedRun) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("step", 1))
    run.send(0, PhaseChanged("save", 10))
    run.now += 1801
    run.tick()
    reply = run.send(0, Heartbeat())
    assert (reply.dump, reply.abort) == (True, None)
    run.send(1, Located("works"))
    run.tick()
    reply = run.send(0, Heartbeat())
    assert reply.abort is not None
    assert "rank 1 makes no progress in phase step after step 1" in reply.abort
    (failure,) = run.coordinator.status().failures
    assert (failure.rank, failure.type) == (1, "StalledError")
    run.coordinator.tick(run.now + 1)
    assert len(run.coordinator.status().failures) == 1


def _all_in_step(run: SimulatedRun) -> None:
    """Both ranks are in the same step for too long."""
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("step", 1))
    run.now += 1801
    run.tick()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({0: "waits", 1: "stopped"}, "rank 1 makes no progress in phase step after step 1, for 1801 s (stopped)"),
        ({0: "waits", 1: "works"}, "rank 1 makes"),
        ({0: "waits", 1: "waits"}, "ranks 0, 1 make"),
    ],
)
def test_of_ranks_in_the_same_step_the_one_that_does_not_wait_is_named(
    said: dict[int, Whereabouts], named: str, run: SimulatedRun
) -> None:
    _all_in_step(run)
    for rank, state in said.items():
        run.send(rank, Located(state))
    run.tick()
    abort = run.send(0, Heartbeat()).abort
    assert abort is not None
    assert named in abort


def test_a_supervisor_that_does_not_say_where_its_rank_is_is_named_after_two_seconds(run: SimulatedRun) -> None:
    _all_in_step(run)
    run.send(0, Located("works"))
    run.coordinator.tick(run.now + 1.9)
    assert run.send(0, Heartbeat()).abort is None
    run.coordinator.tick(run.now + 2.1)
    abort = run.send(0, Heartbeat()).abort
    assert abort is not None
    assert "rank 1 makes no progress" in abort
    assert "(its worker does not answer)" in abort


def test_a_step_that_ends_while_ranks_are_looked_for_is_progress(run: SimulatedRun) -> None:
    _all_in_step(run)
    run.step(2)
    run.coordinator.tick(run.now + 1)
    reply = run.send(0, Heartbeat())
    assert (reply.dump, reply.abort) == (False, None)


def test_ranks_that_have_ended_are_not_waited_for(run: SimulatedRun) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, RankDone("completed", 60))
    run.now += 1e6
    run.tick()
    assert run.coordinator.outcome() == "completed"


def test_steps_without_a_save_for_an_hour_are_progress_of_all_ranks(run: SimulatedRun) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("first_step", 0))
        run.send(rank, PhaseChanged("step", 1))
    for step in range(1, 61):
        run.now += 60
        run.step(step)
        run.send(1, Heartbeat())
        run.tick()
    assert run.coordinator.outcome() is None


def _one_has_saved(run: SimulatedRun) -> None:
    """Both ranks come to the save of step 10; rank 0 is through and waits in the next step, rank 1 is not."""
    run.open()
    for phase, step in [("first_step", 0), ("step", 1), ("save", 10)]:
        for rank in range(2):
            run.send(rank, PhaseChanged(phase, step))
    run.send(0, PhaseChanged("step", 10))


def test_a_rank_that_has_saved_is_not_blamed_for_one_that_has_not(run: SimulatedRun) -> None:
    _one_has_saved(run)
    run.now += 10_000
    run.tick()
    run.send(1, Located("works"))
    run.tick()
    assert [failure.rank for failure in run.coordinator.status().failures] == [1]


def test_a_slow_save_within_its_limit_does_not_end_the_run(run: SimulatedRun) -> None:
    _one_has_saved(run)
    run.now += 500
    run.tick()
    assert run.coordinator.outcome() is None


def _work_for(run: SimulatedRun, seconds: int, speaking: tuple[int, ...]) -> None:
    for _ in range(seconds):
        run.now += 1
        for rank in speaking:
            run.send(rank, Heartbeat())
        run.tick()


def test_a_worker_of_which_nothing_is_heard_is_named(run: SimulatedRun) -> None:
    run.open()
    _work_for(run, 59, speaking=(0,))
    assert run.coordinator.outcome() is None
    _work_for(run, 3, speaking=(0,))
    (failure,) = run.coordinator.status().failures
    assert (failure.rank, failure.type) == (1, "StalledError")
    assert "nothing was heard of the workers of ranks [1]" in failure.message


def test_a_coordinator_that_was_held_up_itself_blames_nobody(run: SimulatedRun) -> None:
    run.open()
    _work_for(run, 30, speaking=(0, 1))
    run.now += 300  # it read a large checkpoint; what the workers said meanwhile waits behind this look
    run.tick()
    _work_for(run, 30, speaking=(0, 1))
    assert run.coordinator.outcome() is None
