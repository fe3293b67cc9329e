"""The contract of a metric sink, the only open list in the system.

A sink with a wrong setting fails when it is made, before the run starts. One that is unreachable or fails
while logging says so in the log and never disturbs the run.
"""

from __future__ import annotations

from typing import Protocol

from dist_ft.metric_rows import EvalRow, StepRow


class Sink(Protocol):
    """Receives every row once, in step order. Calls return at once."""

    def log_step(self, row: StepRow) -> None:
        """Takes a row of metrics.jsonl."""
        ...

    def log_eval(self, row: EvalRow) -> None:
        """Takes a row of eval.jsonl."""
        ...

    def close(self, state: str) -> None:
        """Flushes and ends; `state` is the run's final state."""
        ...
