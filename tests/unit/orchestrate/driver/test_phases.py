"""Following a group to its end, and closing the records, with a coordinator that is played."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_ft.coordinator.failures import Decision, RankFailure
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import DataError, DivergedError, StaleAttemptError, StartTimeoutError, WorkerCrashError
from dist_ft.messages import Phase
from dist_ft.orchestrate.driver import finish, follow
from dist_ft.orchestrate.driver.endings import Ending, ending_of
from dist_ft.orchestrate.driver.export_jobs import BackgroundExports
from dist_ft.orchestrate.driver.session import Session, StopSignals, Timeline
from dist_ft.report.console import Console
from dist_ft.run.events import FirstStep, GroupNotStarted, LedgerEntry
from dist_ft.run.outcome import RunNumbers
from dist_ft.run.place import open_run
from dist_ft.run.run_inputs import ShardSize
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import write_json
from tests.helpers.configs import tiny_config
from tests.helpers.rows import step_row

WORKING = LiveStatus(
    RunRecord("r", "running", world_size=2, workers=[{"rank": 0}, {"rank": 1}]), None, None, [Phase.LOAD], [], None,
    (), None, None, is_waiting=False,
)  # fmt: skip
WAITING = replace(WORKING, record=RunRecord("r"), phases=[], is_waiting=True)
COMPLETED, STOPPED = replace(WORKING, outcome="completed"), replace(WORKING, outcome="stopped")


@dataclass
class Coordinator:
    """Gives one status after the other, the last one for ever, and keeps what it is told."""

    statuses: Sequence[LiveStatus]
    restarts: bool = False
    told: list[Any] = field(default_factory=list)

    def poll(self) -> LiveStatus:
        first, *rest = self.statuses
        self.statuses = rest or [first]
        return first

    def decide(self, message: str) -> bool:
        self.told.append(message)
        return self.restarts

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))


class Streamed:
    """Shards of which one cannot be made, or none are to be."""

    def __init__(self, error: DataError | None = None, sizes: Sequence[ShardSize] = ()) -> None:
        self.error, self.sizes = error, list(sizes)

    def advance(self, starters: Any) -> bool:
        return self.error is not None

    def new_sizes(self) -> list[ShardSize]:
        sizes, self.sizes = self.sizes, []
        return sizes

    def check_patience(self) -> None:
        pass


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(follow, "_POLL_S", 0.0)
    config = tiny_config(tmp_path, cluster__start_timeout_s=1e-9)
    starters: Any = SimpleNamespace(refresh=lambda: False, paths={})
    nothing: Any = None
    return Session(
        config, open_run(tmp_path), Console(is_quiet=True), Timeline(0.0), nothing, nothing, starters, nothing
    )  # fmt: skip


def ended() -> Future[object]:
    group: Future[object] = Future()
    group.set_exception(RuntimeError("the controller\nis gone"))
    return group


def follow_all(session: Session, coordinator: Coordinator, group: Future[object], streamed: Any = None) -> str:
    session.coordinator = coordinator  # type: ignore[assignment]
    return follow.follow(session, group, streamed or Streamed(), BackgroundExports(session))


@pytest.mark.parametrize(("last", "outcome"), [(COMPLETED, "completed"), (STOPPED, "stopped")])
def test_the_outcome_of_the_group_is_returned(session: Session, last: LiveStatus, outcome: str) -> None:
    group: Future[object] = Future()
    group.set_result(None)
    assert follow_all(session, Coordinator([WORKING, last]), group) == outcome


def test_what_made_the_group_fail_is_raised(session: Session) -> None:
    failures = (RankFailure(1, "DivergedError", "loss is nan", step=3),)
    failed = replace(WORKING, failures=failures, decision=Decision(is_restart=False, reason="bad numbers"))
    with pytest.raises(DivergedError, match="loss is nan"):
        follow_all(session, Coordinator([WORKING, failed]), Future())


def test_a_decision_to_restart_is_waited_for(session: Session) -> None:
    restarting = replace(WORKING, decision=Decision(is_restart=True, reason="a node is gone"))
    assert follow_all(session, Coordinator([restarting, WORKING, STOPPED]), Future()) == "stopped"


def test_a_signal_is_passed_on_once(session: Session) -> None:
    session.signals._on_signal(15, None)
    coordinator = Coordinator([WORKING, WORKING, STOPPED])
    follow_all(session, coordinator, Future())
    assert coordinator.told == [("request_stop", "SIGTERM")]


def test_sizes_of_new_shards_are_passed_on_once(session: Session) -> None:
    coordinator, size = Coordinator([WORKING, WORKING, STOPPED]), ShardSize(0, 3, 40)
    follow_all(session, coordinator, Future(), Streamed(sizes=[size]))
    assert coordinator.told == [("add_sizes", [size])]


def test_a_group_that_ray_gives_up_is_started_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Future[object]] = []
    monkeypatch.setattr(Session, "start_group", lambda self: started.append(Future()) or started[-1])
    coordinator = Coordinator([WORKING, STOPPED], restarts=True)
    assert follow_all(session, coordinator, ended()) == "stopped"
    assert len(started) == 1 and coordinator.told == ["the worker group ended: is gone"]


def test_a_group_that_cannot_be_formed_is_a_failure_with_its_cause(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "start_group", lambda self: ended())
    coordinator = Coordinator([WORKING], restarts=True)
    with pytest.raises(WorkerCrashError, match=r"4 times in a row \(failure\.max_same_step=3\): is gone"):
        follow_all(session, coordinator, ended())
    assert len(coordinator.told) == 3, "each end before the last one is decided on"


def test_groups_that_end_after_they_became_attempts_are_the_coordinators_to_count(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "start_group", lambda self: ended())
    attempts = [replace(WORKING, record=replace(WORKING.record, attempt=number)) for number in range(1, 7)]
    coordinator = Coordinator([*attempts, STOPPED], restarts=True)
    assert follow_all(session, coordinator, ended()) == "stopped"


def test_the_reason_why_no_worker_starts_is_part_of_the_message(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow.ray, "available_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(follow.ray, "cluster_resources", lambda: {"CPU": 8.0})
    told = replace(WAITING, ledger=[LedgerEntry(0.0, 0, GroupNotStarted("No module named 'dist_ft'"))])
    with pytest.raises(StartTimeoutError, match="8 of 8 CPU; the last try ended with: No module named 'dist_ft'"):
        follow_all(session, Coordinator([told, WAITING]), Future())


def test_workers_that_do_not_come_in_time_end_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(follow.ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(StartTimeoutError, match="free now: 1 of 8 CPU"):
        follow_all(session, Coordinator([WAITING]), Future())


def test_a_run_that_is_stopped_before_its_workers_come_has_stopped(session: Session) -> None:
    stopping = replace(WAITING, record=RunRecord("r", "stopping"))
    assert follow_all(session, Coordinator([stopping]), Future()) == "stopped"


def test_a_shard_that_cannot_be_made_stops_the_run(session: Session) -> None:
    coordinator = Coordinator([WORKING, STOPPED])
    assert follow_all(session, coordinator, Future(), Streamed(DataError("row 3"))) == "stopped"
    assert coordinator.told[0] == ("request_stop", "a shard of the data cannot be prepared")


def test_the_start_up_is_noted_once(session: Session) -> None:
    stepped = replace(WORKING, row=step_row(1), phases=[Phase.STEP])
    coordinator = Coordinator([WAITING, WORKING, stepped, stepped, STOPPED])
    session.config = session.config.model_copy(
        update={"cluster": session.config.cluster.model_copy(update={"start_timeout_s": 60.0})}
    )
    follow_all(session, coordinator, Future())
    ((name, event),) = coordinator.told
    assert name == "add_event" and isinstance(event, FirstStep)
    assert list(event.seconds_since_start) == ["group", "ranks", "loaded", "first step"]


def test_a_second_signal_gives_up_at_once() -> None:
    signals = StopSignals()
    signals._on_signal(2, None)
    with pytest.raises(KeyboardInterrupt):
        signals.check()  # work without a checkpoint ends at the first
    with pytest.raises(KeyboardInterrupt):
        signals._on_signal(2, None)
    assert signals.take() == "SIGINT" and signals.take() is None


NUMBERS = RunNumbers(final_loss=1.5, train_s=2.0)


@pytest.mark.parametrize(
    ("ending", "told", "steps"),
    [
        (Ending("completed"), ("finish", "completed", NUMBERS.to_record(), None), 7),
        (ending_of(DataError("row 3")), ("finish", "failed", NUMBERS.to_record(), DataError("row 3").to_dict()), 7),
        (ending_of(StaleAttemptError("attempt 4")), ("finish", "failed", {}, None), 0),
    ],
)
def test_the_records_are_closed_as_the_ending_says(session: Session, ending: Ending, told: Any, steps: int) -> None:
    coordinator = Coordinator([])
    session.coordinator = coordinator  # type: ignore[assignment]
    write_json(session.run_dir.run_json, {"step": 7, "attempt": 2})
    result = finish.close(session, ending, NUMBERS)
    assert coordinator.told == [told]
    assert (result.state, result.steps) == (ending.state, steps)
    assert result.final_loss == (1.5 if steps else None)
