"""What the driver learns from the coordinator a few times a second."""

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
    """A run at one moment.

    Attributes:
        record: Contents of run.json.
        row: Newest row of metrics.jsonl.
        evaluation: Newest row of eval.jsonl.
        phases: Phases that the ranks are in.
        ledger: Entries that the driver does not know yet.
        outcome: How the group ended; None while it works, or is to be formed anew.
        failures: Failures of ranks in this attempt.
        decision: What follows them.
        searching: How far the search for the start checkpoint is, in words; None when there is none.
        is_waiting: Whether workers have yet to come.
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
