"""Exports beside training, with a coordinator and a task that are played: order, failures and kills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import ExportError
from dist_ft.orchestrate.driver import export_jobs
from dist_ft.orchestrate.driver.export_jobs import BackgroundExports
from dist_ft.orchestrate.driver.session import Session, Timeline
from dist_ft.report.console import Console
from dist_ft.run.events import Committed, Event, Exported, ExportFailed, Ledger, LedgerEntry, read_ledger
from dist_ft.run.place import Run, open_run, published
from dist_ft.run.state import RunRecord
from tests.helpers.configs import tiny_config
from tests.helpers.manifests import make_manifest

POINT = export_jobs.point


class Killed(BaseException):
    """The driver dies here."""


class Driver:
    """One driver of a run whose ledger lies on the disk; dies before its `dies_at`-th step, if that is set."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch, dies_at: int = 0, **export: Any) -> None:
        self.run, self.dies_at, self.num_steps = run, dies_at, 0
        self.errors: dict[int, Exception] = {}
        self.ledger = Ledger(run.ledger)
        config = tiny_config(run.path, checkpoint__every_steps=10)
        config = config.model_copy(update={"export": config.export.model_copy(update=export)})
        coordinator: Any = SimpleNamespace(add_event=self.note)
        server: Any = SimpleNamespace(socket_path="")
        nothing: Any = None
        session = Session(
            config, run, Console(is_quiet=True), Timeline(0.0), server, nothing, nothing, coordinator
        )  # fmt: skip
        monkeypatch.setattr(export_jobs, "run_task", self.task)
        monkeypatch.setattr(export_jobs, "point", self.before_each(POINT))
        self.exports = BackgroundExports(session)

    def before_each(self, call: Callable[..., str]) -> Callable[..., str]:
        def wrapped(*arguments: Any) -> str:
            self.advance_life()
            return call(*arguments)

        return wrapped

    def advance_life(self) -> None:
        self.num_steps += 1
        if self.num_steps == self.dies_at:
            raise Killed

    def note(self, event: Event) -> None:
        self.advance_life()
        self.ledger.add(event, 1)

    def task(self, socket_path: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        step = int(arguments["checkpoint"].split("-")[1])
        assert arguments["is_beside_training"]
        if step in self.errors:
            raise self.errors[step]
        with published(arguments["to"]) as directory:
            (directory / "model").write_text(arguments["checkpoint"])
        return {}

    def advance(self, *committed: int) -> None:
        """Looks until nothing is left to do."""
        entries = [LedgerEntry(0.0, 1, Committed(step)) for step in committed]
        record = RunRecord("r", "running", attempt=1, max_steps=60)
        status = LiveStatus(record, None, None, [], entries, None, (), None, None, is_waiting=False)
        for _ in range(20):
            self.exports.advance(status)
            self.exports.finish(lambda: None)
            status = LiveStatus(record, None, None, [], [], None, (), None, None, is_waiting=False)

    def content(self, name: str) -> str:
        return (self.run.path / "exports" / name / "model").read_text()


def commit(run: Run, *steps: int, attempt: int = 1) -> None:
    for step in steps:
        manifest = make_manifest(step, attempt)
        run.store.create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = open_run(tmp_path / "run")
    made.path.mkdir()
    take_attempt(made.store, None)
    return made


def events(run: Run, kind: type[Event]) -> list[Any]:
    return [entry.event for entry in read_ledger(run.ledger) if isinstance(entry.event, kind)]


def test_nothing_is_exported_that_nobody_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 10)
    Driver(run, monkeypatch).advance(10)
    assert not run.exports.exists()


def test_latest_follows_the_newest_and_what_it_leaves_goes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(run, monkeypatch, latest=True)
    for step in (10, 20, 30, 40, 50):
        commit(run, step)
        driver.advance(step)
        assert driver.content("latest") == f"{make_manifest(step).directory}/manifest.json"
    kept = {path.name for path in run.exports.iterdir()}
    assert kept == {"latest", *(f"step-{step:08d}" for step in (30, 40, 50))}


def test_a_failed_export_is_said_once_and_ends_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(run, monkeypatch, latest=True, every_steps=10)
    driver.errors = {10: ExportError("too little memory"), 20: OSError(28, "No space left on device")}
    commit(run, 10, 20, 30)
    driver.advance(10, 20, 30)
    assert [(e.step, e.reason) for e in events(run, ExportFailed)] == [
        (10, "ExportError: too little memory"),
        (20, "OSError: [Errno 28] No space left on device"),
    ]
    assert driver.content("latest") == f"{make_manifest(30).directory}/manifest.json"


def test_a_checkpoint_that_went_before_its_turn_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 30)
    Driver(run, monkeypatch, every_steps=10).advance(10, 20, 30)
    assert [e.step for e in events(run, ExportFailed)] == [10, 20]
    assert [e.step for e in events(run, Exported)] == [30]


def test_a_driver_of_an_older_attempt_exports_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 10)
    take_attempt(run.store, None)
    Driver(run, monkeypatch, latest=True).advance(10)
    assert not run.exports.exists()


def test_a_kill_between_any_two_steps_leaves_names_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dies_at in range(1, 7):
        run = open_run(tmp_path / str(dies_at))
        run.path.mkdir()
        take_attempt(run.store, None)
        commit(run, 10)
        Driver(run, monkeypatch, latest=True, every_steps=20).advance(10)
        commit(run, 20, 30)
        first = Driver(run, monkeypatch, dies_at, latest=True, every_steps=20)
        try:
            first.advance(20, 30)
            has_died = False
        except Killed:
            has_died = True
        assert first.content("latest").endswith("/manifest.json")
        (run.exports / ".step-00000030.0a1b2c3d").mkdir(exist_ok=True)  # the task was killed, too
        second = Driver(run, monkeypatch, latest=True, every_steps=20)
        commit(run, 40)
        second.advance(40)
        assert second.content("latest") == f"{make_manifest(40).directory}/manifest.json"
        assert second.content("step-00000020") == f"{make_manifest(20).directory}/manifest.json"
        assert not [path for path in run.exports.iterdir() if path.name.startswith(".")]
    assert not has_died  # the last life was longer than all that there is to do


def test_an_export_of_before_a_fork_is_not_taken_for_the_new_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 10, 20)
    Driver(run, monkeypatch, latest=True).advance(10, 20)
    take_attempt(run.store, make_manifest(10))
    commit(run, 20, attempt=2)
    driver = Driver(run, monkeypatch, latest=True)
    record = RunRecord("r", "running", attempt=2, max_steps=60)
    for _ in range(5):
        driver.exports.advance(LiveStatus(record, None, None, [], [], None, (), None, None, is_waiting=False))
        driver.exports.finish(lambda: None)
    assert driver.content("latest") == f"{make_manifest(20, 2).directory}/manifest.json"
    assert (run.exports / "latest").resolve().name == "step-00000020-a0002"
    assert driver.content("step-00000020") == f"{make_manifest(20).directory}/manifest.json"
