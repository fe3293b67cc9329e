"""Runs the second phase of a driver: show progress and look after the run until its worker group has ended."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future

import ray

from dist_ft.config import Config
from dist_ft.coordinator.failures import explain
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import StartTimeoutError, WorkerCrashError
from dist_ft.messages import Outcome, Phase
from dist_ft.orchestrate.driver.export_jobs import BackgroundExports
from dist_ft.orchestrate.driver.session import Session
from dist_ft.orchestrate.driver.shard_jobs import StreamedData
from dist_ft.run.events import FirstStep, GroupNotStarted

_POLL_S = 0.25
_GROUP_END_LIMIT_S = 20.0


def follow(session: Session, group: Future[object], streamed: StreamedData, exports: BackgroundExports) -> Outcome:
    """Follow the group to its end; start another group if Ray Train gives up and the coordinator does not.

    Args:
        session: The driver.
        group: The group that Ray Train forms.
        streamed: Shards that are made while training goes on.
        exports: Checkpoints that are exported while training goes on.

    Raises:
        DistFtError: The group failed, or never started, or a shard cannot be made.
    """
    coordinator = session.coordinator
    waiting_since = time.monotonic()  # start of the wait for workers, reset while there is a group
    attempt, num_unformed, why = -1, 0, ""  # groups in a row that ended before they became an attempt
    while True:
        status = coordinator.poll()
        why = next((entry.event.reason for entry in status.ledger if isinstance(entry.event, GroupNotStarted)), why)
        session.console.update(status)
        _note_start(session, status)
        exports.advance(status)
        if session.page is not None:
            session.page.advance()
        if streamed.advance(session.refresh_starters()):
            coordinator.request_stop("a shard of the data cannot be prepared")
        if sizes := streamed.new_sizes():
            coordinator.add_sizes(sizes)
        streamed.check_patience()
        if (name := session.signals.take()) is not None:
            coordinator.request_stop(name)
        if status.decision is not None and not status.decision.is_restart:
            raise explain(status.failures)
        if status.outcome == "completed":
            with contextlib.suppress(Exception):  # the ranks have reported how the group ended
                group.result(_GROUP_END_LIMIT_S)
            return "completed"
        if status.outcome == "stopped":
            return "stopped"
        if group.done():
            # Ray Train has given up, or its controller has died together with the workers.
            why = (str(group.exception()).strip().splitlines() or ["without a reason"])[-1]
            num_unformed = num_unformed + 1 if status.record.attempt == attempt else 1
            attempt = status.record.attempt
            if num_unformed > session.config.failure.max_same_step:
                raise WorkerCrashError(
                    f"no worker group could be formed, {num_unformed} times in a row (failure.max_same_step="
                    f"{session.config.failure.max_same_step}): {why}"
                )
            if not coordinator.decide(f"the worker group ended: {why}"):
                continue  # the next status has the decision
            group = session.start_group()
            time.sleep(_POLL_S)
        if not status.is_waiting:
            waiting_since = time.monotonic()
        elif status.record.state == "stopping":
            return "stopped"
        elif time.monotonic() - waiting_since > session.config.cluster.start_timeout_s:
            raise _not_started(session.config, why)
        time.sleep(_POLL_S)


def _note_start(session: Session, status: LiveStatus) -> None:
    """Record how the seconds before the first step are spent."""
    timeline = session.timeline
    if "first step" in timeline.marks:
        return
    record = status.record
    if record.world_size:
        timeline.mark("group")
    if record.world_size and len(record.workers) == record.world_size:
        timeline.mark("ranks")
    if status.phases and not {Phase.START, Phase.LOAD} & set(status.phases):
        timeline.mark("loaded")
    if status.row is not None:
        timeline.mark("first step")
        session.coordinator.add_event(FirstStep(timeline.marks))
        seconds = timeline.marks["first step"]
        session.console.say(f"  first step after {seconds:.1f} s ({timeline.describe()})", "dim")


def _not_started(config: Config, why: str) -> StartTimeoutError:
    free, total = ray.available_resources(), ray.cluster_resources()
    shown = ", ".join(f"{free.get(k, 0):g} of {total[k]:g} {k}" for k in ("GPU", "CPU") if k in total)
    return StartTimeoutError(
        f"cluster.num_workers={config.cluster.num_workers}: they did not start within cluster.start_timeout_s="
        f"{config.cluster.start_timeout_s:g}; free now: {shown}" + (f"; the last try ended with: {why}" if why else "")
    )
