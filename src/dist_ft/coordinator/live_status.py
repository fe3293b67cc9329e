"""Defines the status that the driver reads from the coordinator a few times a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.coordinator.failures import Decision, RankFailure
from dist_ft.messages import Phase
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.run.events import LedgerEntry
from dist_ft.run.state import RunRecord


@dataclass(frozen=True)
class LiveStatus:
    """Describes a run at one moment.

    Attributes:
        record: Contents of run.json.
        row: Newest row of metrics.jsonl.
        evaluation: Newest row of eval.jsonl.
        phases: Phases that the ranks are in.
        ledger: Ledger entries that the driver does not know yet.
        outcome: How the group ended; None while it works or a new group follows.
        failures: Failures of ranks in this attempt.
        decision: Decision after the failures.
        searching: Progress of the search for the start checkpoint, in words; None if there is no search.
        is_waiting: Whether the run waits for workers.
    """

    record: RunRecord
    row: StepRow | None
    evaluation: EvalRow | None
    phases: Sequence[Phase]
    ledger: Sequence[LedgerEntry]
    outcome: str | None
    failures: Sequence[RankFailure]
    decision: Decision | None
    searching: str | None
    is_waiting: bool
