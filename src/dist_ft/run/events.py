"""Defines the ledger of a run: a class for each event, and the append-only file that holds the events.

An entry of ledger.jsonl is `{time, event, attempt, …}`, where `…` are the fields of the event's class.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from dist_ft.run.log import JsonlWriter, read_lines


@dataclass(frozen=True)
class Event:
    """Base class of the events in a ledger; `name` is the event's name in the file."""

    name: ClassVar[str] = ""

    def facts(self) -> dict[str, Any]:
        """Return the fields of the event as the file holds them, without its name."""
        return asdict(self)


@dataclass(frozen=True)
class AttemptBegan(Event):
    """A driver has taken an attempt number and forms a group."""

    name: ClassVar[str] = "attempt"
    world_size: int
    start_step: int


@dataclass(frozen=True)
class GroupNotStarted(Event):
    """Ray could not start the workers of a group and tries again."""

    name: ClassVar[str] = "group_not_started"
    reason: str


@dataclass(frozen=True)
class GroupLoaded(Event):
    """Every rank is built and has loaded its part of the checkpoint.

    Attributes:
        step: Completed steps.
        num_bytes: Bytes of slices that all ranks read.
        notes: What a person should know about how the run continues.
    """

    name: ClassVar[str] = "loaded"
    step: int
    num_bytes: int
    notes: list[str]


@dataclass(frozen=True)
class FirstStep(Event):
    """The driver has seen its first step; `seconds_since_start` shows how the time until then was spent."""

    name: ClassVar[str] = "first_step"
    seconds_since_start: dict[str, float]


@dataclass(frozen=True)
class Committed(Event):
    """The checkpoint of a step is committed."""

    name: ClassVar[str] = "commit"
    step: int


@dataclass(frozen=True)
class SaveFailed(Event):
    """The checkpoint of a step could not be written; the run goes on without it."""

    name: ClassVar[str] = "save_failed"
    step: int
    reason: str


@dataclass(frozen=True)
class SaveSkipped(Event):
    """A save was due while the one before was still being written."""

    name: ClassVar[str] = "save_skipped"
    step: int


@dataclass(frozen=True)
class SaveStreamed(Event):
    """A node had no memory for copies of the slices, so training waited for the disk; noted once an attempt."""

    name: ClassVar[str] = "save_streamed"
    step: int
    rank: int
    needed: int
    free: int


@dataclass(frozen=True)
class IntervalChosen(Event):
    """With `checkpoint.every_steps: auto`, the time between checkpoints, and the figures that it follows from."""

    name: ClassVar[str] = "interval"
    step: int
    interval_s: float
    num_steps: int
    cost_s: float
    mtbf_s: float


@dataclass(frozen=True)
class OverBudget(Event):
    """The checkpoints that never go (newest, best, held) are larger than `checkpoint.max_gib`."""

    name: ClassVar[str] = "over_budget"
    step: int
    num_bytes: int
    max_bytes: int


@dataclass(frozen=True)
class CheckpointDamaged(Event):
    """A checkpoint cannot be read and is skipped; `step` is None if its manifest cannot be read either."""

    name: ClassVar[str] = "checkpoint_damaged"
    step: int | None
    error: str


@dataclass(frozen=True)
class Exported(Event):
    """A checkpoint was exported as a model; `directory` is its folder, empty for the one that the step names."""

    name: ClassVar[str] = "exported"
    step: int
    checkpoint: str
    directory: str = ""


@dataclass(frozen=True)
class ExportFailed(Event):
    """A checkpoint could not be exported while training went on; the run goes on without it."""

    name: ClassVar[str] = "export_failed"
    step: int
    reason: str


@dataclass(frozen=True)
class SettingsChanged(Event):
    """The config differs from the last attempt's; `changes` are `key: old → new`."""

    name: ClassVar[str] = "settings_changed"
    changes: list[str]


@dataclass(frozen=True)
class StopRequested(Event):
    """Someone asked the run to checkpoint and stop."""

    name: ClassVar[str] = "stop_requested"
    reason: str


@dataclass(frozen=True)
class EarlyStop(Event):
    """The run ended before its last step because `metric` did not improve for `patience` evaluations."""

    name: ClassVar[str] = "early_stop"
    step: int
    best_step: int | None
    metric: str
    patience: int


@dataclass(frozen=True)
class StragglerFound(Event):
    """A rank is much slower than the others; `node_ip` is None if its node is not known."""

    name: ClassVar[str] = "straggler"
    rank: int
    times_slower: float
    node_ip: str | None


@dataclass(frozen=True)
class RankLost(Event):
    """A rank has failed, after `step` completed steps of the run."""

    name: ClassVar[str] = "rank_failed"
    rank: int
    step: int
    type: str
    message: str


@dataclass(frozen=True)
class Resizing(Event):
    """The group checkpoints and ends, and a new group is formed."""

    name: ClassVar[str] = "resizing"
    step: int
    reason: str


@dataclass(frozen=True)
class Recovering(Event):
    """A new group is formed after a failure; `cause` is the wire form of the error."""

    name: ClassVar[str] = "recovering"
    step: int
    wait_s: float
    reason: str
    cause: dict[str, str]


@dataclass(frozen=True)
class GivingUp(Event):
    """The run ends after a failure; `cause` is the wire form of the error."""

    name: ClassVar[str] = "giving_up"
    step: int
    wait_s: float
    reason: str
    cause: dict[str, str]


@dataclass(frozen=True)
class BatchSkipped(Event):
    """The update of a step is skipped from now on because its numbers were bad."""

    name: ClassVar[str] = "skip_batch"
    step: int


@dataclass(frozen=True)
class CoordinatorRestarted(Event):
    """Ray has started the coordinator again, for the `times`-th time in this driver."""

    name: ClassVar[str] = "coordinator_restarted"
    times: int


@dataclass(frozen=True)
class RunCompleted(Event):
    """The run completed all its steps."""

    name: ClassVar[str] = "completed"
    step: int


@dataclass(frozen=True)
class RunStopped(Event):
    """The run saved a checkpoint and ended on request."""

    name: ClassVar[str] = "stopped"
    step: int


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended with an error; `error` is its wire form, or None if another driver has taken over."""

    name: ClassVar[str] = "failed"
    step: int
    error: dict[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """See `Event`."""
        return asdict(self) if self.error else {"step": self.step}


@dataclass(frozen=True)
class UnknownEvent(Event):
    """An event that another version of dist-ft wrote."""

    called: str
    other: dict[str, Any]

    def facts(self) -> dict[str, Any]:
        """See `Event`."""
        return dict(self.other)


RUN_ENDS: dict[str, type[RunCompleted | RunStopped]] = {cls.name: cls for cls in (RunCompleted, RunStopped)}
"""The events with which a run ends that did not fail."""
_EVENTS = {cls.name: cls for cls in Event.__subclasses__() if cls is not UnknownEvent}


@dataclass(frozen=True)
class LedgerEntry:
    """An event with its time and attempt.

    Attributes:
        time: Unix time in seconds.
        attempt: Attempt of the writer; None before its first.
        event: What happened.
    """

    time: float
    attempt: int | None
    event: Event

    @property
    def name(self) -> str:
        """The event's name in the file."""
        return self.event.called if isinstance(self.event, UnknownEvent) else self.event.name

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as the file holds it."""
        attempt = {} if self.attempt is None else {"attempt": self.attempt}
        return {"time": self.time, "event": self.name, **attempt, **self.event.facts()}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LedgerEntry:
        """Inverse of `to_dict`. An event that lacks one of its facts is unknown: one bad line must not end a resume."""
        name = entry["event"]
        facts = {key: value for key, value in entry.items() if key not in ("time", "event", "attempt")}
        kind = _EVENTS.get(name)
        if kind is None:
            return cls(entry["time"], entry.get("attempt"), UnknownEvent(name, facts))
        known = {item.name for item in fields(kind)}
        try:
            event: Event = kind(**{key: value for key, value in facts.items() if key in known})
        except TypeError:
            event = UnknownEvent(name, facts)
        return cls(entry["time"], entry.get("attempt"), event)


class Ledger:
    """Writes ledger.jsonl and keeps this process's entries for the console."""

    def __init__(self, path: Path) -> None:
        self._writer = JsonlWriter(path)
        self.entries: list[LedgerEntry] = []

    def add(self, event: Event, attempt: int | None) -> LedgerEntry:
        """Append an entry and return it; `attempt` is the writer's, None before its first."""
        entry = LedgerEntry(round(time.time(), 3), attempt, event)
        self._writer.append(entry.to_dict())
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Read ledger.jsonl; leaves out lines that are no entries."""
    lines = (line for line in read_lines(path) if isinstance(line, dict) and {"time", "event"} <= line.keys())
    return [LedgerEntry.from_dict(entry) for entry in lines]
