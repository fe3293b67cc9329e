"""Writes the records of a run: run.json, ledger, metrics, evaluations. Only the newest attempt may write.

A driver that was suspended or cut off for a while may continue at any line of its program. Before each write, the
recorder therefore checks whether a newer attempt has been taken. A takeover between
check and write is harmless, because readers prefer the rows of the newest attempt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from dist_ft.checkpoint.interval import mean_time_between_failures_s
from dist_ft.checkpoint.lineage import Attempt, newest_number
from dist_ft.coordinator.story import Story, alert_of
from dist_ft.errors import StaleAttemptError
from dist_ft.layout import RunDir, checkpoint_name
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.alerts import AlertReceiver
from dist_ft.monitor.sink import CHECKPOINT, RECOVERY_S, SYSTEM, Answers, Sink
from dist_ft.run.events import (
    RUN_ENDS,
    AttemptBegan,
    BatchSkipped,
    Committed,
    Event,
    GroupLoaded,
    Ledger,
    LedgerEntry,
    Recovering,
    Resizing,
    RunFailed,
    read_ledger,
)
from dist_ft.run.goodput import Goodput
from dist_ft.run.log import JsonlWriter, read_evals, read_steps
from dist_ft.run.place import Run
from dist_ft.run.state import RunRecord
from dist_ft.run.sync import Sender
from dist_ft.storage.publish import read_json, write_json

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the records of one run. It stops writing once another driver has taken over.

    Attributes:
        record: Contents of run.json.
        attempt: The attempt that this driver has taken; 0 before the first.
        last_row: Newest row of metrics.jsonl.
        last_eval: Newest row of eval.jsonl.
    """

    def __init__(
        self, run_dir: Run, record: RunRecord, sinks: Sequence[Sink], alerts: Sequence[AlertReceiver] = ()
    ) -> None:
        self.record = record
        self.attempt = 0
        self.last_row: StepRow | None = None
        self.last_eval: EvalRow | None = None
        self._run_dir = run_dir
        self._newest = newest_number(run_dir.store)
        self._looked_at = time.monotonic()
        self._ledger = Ledger(run_dir.ledger)
        self._story = Story(run_dir.story, read_ledger(run_dir.ledger))
        self._metrics = JsonlWriter(run_dir.metrics)
        self._evals = JsonlWriter(run_dir.evals)
        self._sinks = list(sinks)
        self._alerts = list(alerts)
        self._for_sinks: dict[str, float] = {}  # with the next step; metrics.jsonl has numbers of the training only
        self._interrupted_at: float | None = None
        self._goodput = Goodput(read_steps(run_dir.metrics), _active_s(run_dir, record), time.monotonic())
        self._written_at = 0.0
        self._sender = Sender(run_dir)
        # For an existing run, run.json keeps the state of its last attempt until this driver takes one.
        self.write_record()

    @property
    def is_mine(self) -> bool:
        """Whether this driver's attempt is the newest, or no attempt exists while it has none.

        The answer is as of the last look at the store, which is at most `look_every_s` old.
        """
        if time.monotonic() - self._looked_at >= self._run_dir.look_every_s:
            try:
                self.look_again()
            except OSError as error:  # before each critical action, `look_again` is called anyway
                self._looked_at = time.monotonic()
                logger.warning("nobody knows whether a newer attempt has begun: %s", error)
        return self._newest == self.attempt

    @property
    def entries(self) -> list[LedgerEntry]:
        """Ledger entries of this process."""
        return self._ledger.entries

    def look_again(self) -> None:
        """Read which attempt is the newest, before an action that a driver must not do after a takeover.

        Raises:
            OSError: The store does not answer.
        """
        self._newest, self._looked_at = newest_number(self._run_dir.store), time.monotonic()

    def send(self) -> None:
        """Send all rows so far to the store and wait for it. Call it before committing their steps.

        Raises:
            OSError: The rows cannot be written to the store.
        """
        self._sender.send()

    def commits(self) -> set[str]:
        """Return the folders of all checkpoints that are committed according to the ledger."""
        return {
            f"checkpoints/{checkpoint_name(entry.event.step, entry.attempt or 0)}"
            for entry in read_ledger(self._run_dir.ledger)
            if isinstance(entry.event, Committed)
        }

    def mean_time_between_failures_s(self, now: float) -> float:
        """Return the expected seconds between failures of the run; `now` in monotonic seconds."""
        num_failures = sum(isinstance(entry.event, Recovering) for entry in read_ledger(self._run_dir.ledger))
        return mean_time_between_failures_s(self._goodput.active_s(now), num_failures)

    def evaluations(self, until: int) -> list[EvalRow]:
        """Return the valid evaluations of the first `until` steps, in order."""
        return [row for step, row in sorted(read_evals(self._run_dir.evals).items()) if step <= until]

    def skipped_steps(self) -> list[int]:
        """Return the steps whose update is skipped according to the ledger."""
        events = (entry.event for entry in read_ledger(self._run_dir.ledger))
        return sorted({event.step for event in events if isinstance(event, BatchSkipped)})

    def check_mine(self) -> None:
        """Raise StaleAttemptError when another driver has taken over the run."""
        if self.attempt and not self.is_mine and self._newest > self.attempt:
            raise StaleAttemptError(
                f"attempt {self._newest} of this run has begun elsewhere; attempt {self.attempt} writes nothing more"
            )

    def begin_attempt(self, attempt: Attempt, world_size: int) -> None:
        """Open the records for an attempt that this driver has taken."""
        self.attempt = self._sender.attempt = attempt.number
        self.look_again()
        self.record.workers = []
        self.record.attempt = attempt.number
        self.record.step = attempt.start_step
        self.record.world_size = world_size
        # Written even if another driver takes over at this moment, because the ledger has every attempt.
        self._add(AttemptBegan(world_size, attempt.start_step), attempt.number)
        self.write_record()

    def note(self, event: Event) -> None:
        """Write a ledger entry."""
        if not self.attempt or self.is_mine:
            self._add(event, self.attempt or None)
            self._sender.soon()

    def _add(self, event: Event, attempt: int | None) -> None:
        entry = self._ledger.add(event, attempt)
        if isinstance(event, Recovering | Resizing):
            self._interrupted_at = entry.time
        elif isinstance(event, GroupLoaded) and self._interrupted_at is not None:
            self._for_sinks[RECOVERY_S] = round(entry.time - self._interrupted_at, 3)
            self._interrupted_at = None
        if (alert := alert_of(self.record.run_id, entry)) is not None:
            for receiver in self._alerts:
                receiver.send_alert(alert)
        try:
            self._story.add(entry)
        except OSError as error:  # a full disk; it follows from the ledger and is written anew by the next coordinator
            logger.warning("the story lacks a line: %s", error)

    def write_record(self) -> None:
        """Replace run.json and send it soon."""
        self._write_record()
        self._sender.soon()

    def _write_record(self) -> None:
        self._written_at = now = time.monotonic()
        if self.is_mine:
            self.record.active_s = round(self._goodput.active_s(now), 2)
            self.record.useful_s = round(self._goodput.useful_s(self.record.step), 2)
            self.record.goodput = round(self._goodput.value(self.record.step, now), 4)
            write_json(self._run_dir.run_json, asdict(self.record))

    def write_record_now_and_then(self) -> None:
        """Replace run.json unless that was done within the last second."""
        # An fsync at every step would cost more than the step of a small model.
        if time.monotonic() - self._written_at > 1.0:
            self._write_record()

    def log_step(self, row: StepRow) -> None:
        """Record a row of metrics.jsonl."""
        self._goodput.add(row.step, row.step_s)
        row = replace(row, goodput=round(self._goodput.value(row.step, time.monotonic()), 4))
        self._metrics.append(row.to_dict())
        self.last_row = row
        self.record.step = row.step
        self.write_record_now_and_then()
        shown = replace(row, metrics={**row.metrics, **self._for_sinks})
        self._for_sinks = {}
        for sink in self._sinks:
            sink.log_step(shown)

    def log_node(self, node: str, numbers: Mapping[str, float]) -> None:
        """Keep what a node is doing, for the next row of the sinks."""
        self._for_sinks |= {f"{SYSTEM}{node}/{name}": number for name, number in numbers.items()}

    def log_save(self, blocked_s: float, written_s: float) -> None:
        """Keep what a checkpoint cost rank 0, for the next row of the sinks."""
        self._for_sinks |= {f"{CHECKPOINT}blocked_s": blocked_s, f"{CHECKPOINT}written_s": written_s}

    def log_eval(self, row: EvalRow) -> None:
        """Record a row of eval.jsonl."""
        if not self.is_mine:
            return
        self._evals.append(row.to_dict())
        self.last_eval = row
        for sink in self._sinks:
            sink.log_eval(row)

    def log_answers(self, answers: Answers) -> None:
        """Pass sample answers on to the sinks; the driver has written them to the run directory."""
        if self.is_mine:
            for sink in self._sinks:
                sink.log_answers(answers)

    def finish(self, state: str, result: dict[str, Any], error: dict[str, str] | None) -> None:
        """Close the records, as the last call. A record of another driver is not changed."""
        if self.is_mine:
            self.record.move(state)
            self.record.result = result
            self.record.error = error
            self.record.workers = []
            step = self.record.step
            self.note(RunFailed(step, error) if state == "failed" else RUN_ENDS[state](step))
            self.write_record()
            self._forget_stop()
        for sink in self._sinks:
            sink.close(state)
        self._metrics.close()
        self._evals.close()
        self._ledger.close()
        self._story.close()
        self._sender.close()

    def _forget_stop(self) -> None:
        try:
            self._run_dir.forget_stop()
        except OSError as error:  # the next driver recognises the request as an old one
            logger.warning("the request to stop stays: %s", error)


def _active_s(run_dir: RunDir, record: RunRecord) -> float:
    """Return how long drivers have been at work, up to now.

    `record` has the time that the driver found in run.json, plus its own start. If run.json has more now, the
    coordinator was restarted under the driver, and the time since run.json was written counts, too.
    """
    if not run_dir.run_json.exists():
        return record.active_s
    stored = float(read_json(run_dir.run_json).get("active_s", 0.0))
    if stored <= record.active_s:
        return record.active_s
    return stored + max(0.0, time.time() - run_dir.run_json.stat().st_mtime)
