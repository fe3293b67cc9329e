"""Holds what the phases of a driver share: the run, the cluster, the coordinator, fork servers, stop signals."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from dist_ft.config import Config
from dist_ft.jobs.spec import TaskSpec
from dist_ft.orchestrate.driver.connect import ClusterInfo
from dist_ft.orchestrate.driver.coordination import CoordinatorHandle
from dist_ft.orchestrate.driver.tasks import run_tasks
from dist_ft.orchestrate.live_page import LivePage
from dist_ft.orchestrate.workers.processes import ForkServer
from dist_ft.orchestrate.workers.ray_group import GroupSettings, make_trainer
from dist_ft.orchestrate.workers.starters import Starters
from dist_ft.report.console import Console
from dist_ft.run.place import Run

T = TypeVar("T")


@dataclass
class Timeline:
    """Records the seconds from the driver's begin to each event of the start-up."""

    began: float
    marks: dict[str, float] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Record the time of an event, the first time that it is marked."""
        self.marks.setdefault(name, round(time.monotonic() - self.began, 2))

    def describe(self) -> str:
        """Return `ray 3.1 s, prepared 6.0 s, …`."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.marks.items())


class StopSignals:
    """Handles SIGINT and SIGTERM: the first asks for a checkpoint and a stop, the second gives up at once.

    Attributes:
        was_asked: Whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.was_asked = False
        self._pending: str | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block. Only the main thread may call this."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def take(self) -> str | None:
        """Return the name of a signal that was not taken yet; None if there is none."""
        pending, self._pending = self._pending, None
        return pending

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal was not taken yet: work without a checkpoint ends at once."""
        if self._pending is not None:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.was_asked:
            raise KeyboardInterrupt
        self.was_asked = True
        self._pending = signal.Signals(number).name


@dataclass
class Session:
    """Holds the parts of one driver of one run.

    Attributes:
        config: The run config; the commit of a hub model is added when it is known.
        run_dir: The run.
        console: Shows progress.
        timeline: How the seconds of the start-up are spent.
        server: Fork server of this node.
        cluster: The cluster that `connect` found.
        starters: Fork servers of all nodes.
        coordinator: The coordinator actor.
        signals: Requests to stop from the terminal or the system.
        page: Keeps the page about the run up to date; None for none.
    """

    config: Config
    run_dir: Run
    console: Console
    timeline: Timeline
    server: ForkServer
    cluster: ClusterInfo
    starters: Starters
    coordinator: CoordinatorHandle
    signals: StopSignals = field(default_factory=StopSignals)
    page: LivePage | None = None

    def refresh_starters(self) -> Mapping[str, str]:
        """Refresh the fork servers and tell the coordinator of changes; return their sockets by node id."""
        if self.starters.refresh():
            self.coordinator.set_starters(self.starters.paths)
        return self.starters.paths

    def run_tasks(self, specs: Sequence[TaskSpec]) -> list[dict[str, Any]]:
        """Run tasks on the cluster and wait for them; a signal ends the wait."""
        return run_tasks(specs, self.starters.paths, self.cluster.on_gpu, self.signals.check)

    def start_group(self) -> Future[object]:
        """Let Ray Train form the group, and again after each failure; the future ends when Ray Train gives up."""
        settings = GroupSettings(self.coordinator.where, self.cluster.on_gpu, self.config.failure.limits.silence_s)
        scratch = self.server.directory / "ray-train"
        trainer = make_trainer(self.config, resources=self.cluster.resources, settings=settings, scratch=scratch)
        return in_thread(trainer.fit)


def open_session(
    config: Config, run_dir: Run, console: Console, timeline: Timeline, server: ForkServer, cluster: ClusterInfo
) -> Session:
    """Return a session with a coordinator actor, which starts at once, and fork servers, which start later."""
    starters, coordinator = Starters(server, cluster.on_gpu), CoordinatorHandle(config.run.name)
    return Session(config, run_dir, console, timeline, server, cluster, starters, coordinator)


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run a call on a daemon thread, so that the driver can end before the call."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # the future raises it to the caller
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
