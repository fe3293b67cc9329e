"""The check of a start checkpoint on a slow store: status and stop are answered while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.errors import CheckpointError
from dist_ft.messages import Heartbeat
from dist_ft.storage.store import LocalStore
from tests.helpers.simulated_run import SimulatedRun


class SlowStore(LocalStore):
    """A store that reads nothing of a checkpoint's data before it is let go on."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_asked = threading.Event()
        self.may_read = threading.Event()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        self.is_asked.set()
        assert self.may_read.wait(60)
        return super().read_range(name, start, length)


class Searches:
    """Runs each search on a thread, as the actor does."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, search: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=search))
        self.threads[-1].start()

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def slow(run: SimulatedRun) -> Iterator[SlowStore]:
    """A run with checkpoints of steps 10 and 20, whose next driver finds a slow store."""
    run.open()
    run.commit(10)
    run.commit(20)
    store = SlowStore(run.dir.path)
    run.dir, run.run_search = replace(run.dir, store=store), Searches()
    run.restart()
    yield store
    store.may_read.set()
    run.run_search.join()


def _end_search(run: SimulatedRun, store: SlowStore) -> None:
    store.may_read.set()
    assert isinstance(run.run_search, Searches)
    run.run_search.join()


def test_status_is_answered_while_a_checkpoint_is_read_and_says_so(run: SimulatedRun, slow: SlowStore) -> None:
    assert run.coordinator.open_attempt(2, run.now) is None
    assert slow.is_asked.wait(60)
    for _ in range(3):
        run.tick()
        status = run.coordinator.status()
        assert "checking the checkpoint of step 20" in status.searching
        assert not status.is_waiting  # the time that workers have to come is not running
        assert run.coordinator.open_attempt(2, run.now) is None
    _end_search(run, slow)
    assert run.open().start_checkpoint == "checkpoints/step-00000020-a0001/manifest.json"
    assert run.coordinator.status().searching is None
    assert run.send(0, Heartbeat()).abort is None


def test_a_group_that_is_lost_during_the_search_and_never_comes_back_is_missed(
    run: SimulatedRun, slow: SlowStore
) -> None:
    """Nobody asks for the result of the search then, and the driver would wait for ever."""
    assert run.coordinator.open_attempt(2, run.now) is None
    assert run.coordinator.decide("the worker's node died", [], run.now).is_restart
    _end_search(run, slow)
    run.tick()
    assert run.coordinator.status().is_waiting
    assert run.open().start_checkpoint == "checkpoints/step-00000020-a0001/manifest.json"


def test_a_stop_is_taken_while_a_checkpoint_is_read(run: SimulatedRun, slow: SlowStore) -> None:
    assert run.coordinator.open_attempt(2, run.now) is None
    assert slow.is_asked.wait(60)
    run.dir.stop_request.write_text("{}")
    run.tick()
    status = run.coordinator.status()
    assert (status.record.state, status.is_waiting) == ("stopping", True)  # so the driver ends the run
    run.coordinator.finish("stopped", {})
    assert run.sink.states == ["stopped"]


def test_damage_that_is_found_on_the_way_is_passed_over(run: SimulatedRun, slow: SlowStore) -> None:
    run.damage(20, 1)
    assert run.coordinator.open_attempt(2, run.now) is None
    _end_search(run, slow)
    assert run.open().start_checkpoint == "checkpoints/step-00000010-a0001/manifest.json"
    assert [entry["step"] for entry in run.events("checkpoint_damaged")] == [20]


def test_what_ends_a_search_is_raised_where_the_attempt_is_opened(run: SimulatedRun, slow: SlowStore) -> None:
    for step in (10, 20):
        run.damage(step, 1)
    assert run.coordinator.open_attempt(2, run.now) is None
    _end_search(run, slow)
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        run.coordinator.open_attempt(2, run.now)


def test_a_search_that_no_longer_stands_is_made_anew(run: SimulatedRun, slow: SlowStore) -> None:
    assert run.coordinator.open_attempt(2, run.now) is None
    _end_search(run, slow)
    slow.may_read.clear()
    slow.delete("checkpoints/step-00000020-a0001")  # the driver before has cleaned up meanwhile
    assert run.coordinator.open_attempt(2, run.now) is None
    _end_search(run, slow)
    spec = run.open()
    assert (spec.attempt, spec.start_checkpoint) == (3, "checkpoints/step-00000010-a0001/manifest.json")
