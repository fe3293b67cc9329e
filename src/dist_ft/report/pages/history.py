"""Tells what became of the attempts of a run, from its ledger and rows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dist_ft.metric_rows import StepRow
from dist_ft.run.events import (
    AttemptBegan,
    Committed,
    EarlyStop,
    Event,
    GivingUp,
    GroupLoaded,
    LedgerEntry,
    RankLost,
    Recovering,
    Resizing,
    RunCompleted,
    RunFailed,
    RunStopped,
)

_FAILURES: tuple[type[Event], ...] = (RankLost, Recovering, GivingUp, RunFailed)
_ENDS: tuple[type[Event], ...] = (*_FAILURES, Resizing, EarlyStop, RunCompleted, RunStopped)


@dataclass
class AttemptSpan:
    """One attempt.

    Attributes:
        number: Its number.
        world_size: Its ranks.
        start_step: Completed steps of the checkpoint that it began from.
        began: Unix time at which its number was taken.
        loaded: Unix time at which all its ranks were ready; None if that never came.
        ended: Unix time of what ended it, or of the newest entry.
        ending: What ended it; empty while it works.
        is_failure: Whether that was a failure.
        end_step: Last step that it made.
        recovery_s: Seconds from what ended the attempt before to `loaded`; None for the first attempt.
    """

    number: int
    world_size: int
    start_step: int
    began: float
    loaded: float | None = None
    ended: float = 0.0
    ending: str = ""
    is_failure: bool = False
    end_step: int = 0
    recovery_s: float | None = None
    _has_ended: bool = field(default=False, repr=False)


def attempts_of(ledger: Sequence[LedgerEntry], steps: Mapping[int, StepRow]) -> list[AttemptSpan]:
    """Return the attempts of a run, oldest first."""
    spans: list[AttemptSpan] = []
    for entry in ledger:
        event = entry.event
        if isinstance(event, AttemptBegan):
            spans.append(AttemptSpan(entry.attempt or 0, event.world_size, event.start_step, entry.time))
        if not spans:
            continue
        span = spans[-1]
        if not span._has_ended:
            span.ended = entry.time
        if isinstance(event, GroupLoaded):
            span.loaded = entry.time
        if isinstance(event, _ENDS) and not span._has_ended:  # the first one is the cause of those after it
            span.ending, span.is_failure, span._has_ended = _describe(event), isinstance(event, _FAILURES), True
    for before, span in itertools.pairwise(spans):
        if span.loaded is not None:
            span.recovery_s = span.loaded - before.ended
    last = {span.number: span.start_step for span in spans}
    for row in steps.values():
        if row.attempt in last:
            last[row.attempt] = max(last[row.attempt], row.step)
    for span in spans:
        span.end_step = last[span.number]
    return spans


def commits_of(ledger: Sequence[LedgerEntry]) -> list[tuple[float, int]]:
    """Return time and step of each checkpoint that was committed."""
    return [(entry.time, entry.event.step) for entry in ledger if isinstance(entry.event, Committed)]


def bands_of(steps: Mapping[int, StepRow]) -> list[tuple[int, int, int]]:
    """Return attempt, first and last step of each stretch of steps that one attempt made."""
    rows = [steps[step] for step in sorted(steps)]
    found = []
    for attempt, group in itertools.groupby(rows, key=lambda row: row.attempt):
        made = [row.step for row in group]
        found.append((attempt, made[0], made[-1]))
    return found


def _describe(event: Event) -> str:
    match event:
        case RankLost(rank=rank, type=kind, message=message):
            return f"rank {rank}: {kind}: {message}"
        case Recovering(cause=cause) | GivingUp(cause=cause):
            return f"{cause.get('type', 'failure')}: {cause.get('message', '')}"
        case RunFailed(error=error):
            return f"{error['type']}: {error['message']}" if error else "another driver has taken over"
        case Resizing(reason=reason):
            return f"resize: {reason}"
        case _:
            return event.name.replace("_", " ")
