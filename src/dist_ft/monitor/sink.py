"""The contract of a metric sink, and what all sinks are told of a run.

A sink with a wrong setting fails when it is made, before the run starts. One that is unreachable or fails
while logging says so in the log and never disturbs the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_ft.metric_rows import EvalRow, StepRow

_GROUPS = {"epoch": "data", "position": "data", "tokens": "data", "trained_tokens": "data",
           "tokens_per_s": "perf", "step_s": "perf", "data_s": "perf", "mfu": "perf",
           "attempt": "run", "world_size": "run", "goodput": "run"}  # fmt: skip
SYSTEM = "system/"
"""Begin of the names of numbers of a node, such as `system/10.0.0.1/cpu_percent`."""
CHECKPOINT = "checkpoint/"
"""Begin of the names of what a checkpoint cost: `blocked_s` of training, `written_s` until it was on the disk."""
RECOVERY_S = "run/recovery_s"
"""Seconds from a failure or the begin of a resize until the next group has loaded; with its first step."""
_NAMED_ALREADY = (SYSTEM, CHECKPOINT, RECOVERY_S)
_NO_NUMBERS = ("step", "digest")


@dataclass(frozen=True)
class Answers:
    """Sample answers of a finished run.

    Attributes:
        step: Completed optimizer steps of the tuned model.
        rows: `prompt`, `reference` and the answer of each model by its name; every row has the same keys.
    """

    step: int
    rows: Sequence[Mapping[str, str]]

    @property
    def columns(self) -> list[str]:
        """Heads of the table."""
        return list(self.rows[0]) if self.rows else []

    @property
    def cells(self) -> list[list[str]]:
        """Texts of the table, row by row."""
        return [list(row.values()) for row in self.rows]


class Sink(Protocol):
    """Receives every row in step order, replayed steps again. Calls return at once."""

    def log_step(self, row: StepRow) -> None:
        """Take a row of metrics.jsonl."""
        ...

    def log_eval(self, row: EvalRow) -> None:
        """Take a row of eval.jsonl."""
        ...

    def log_answers(self, answers: Answers) -> None:
        """Take sample answers; a sink without tables leaves them."""
        ...

    def close(self, state: str) -> None:
        """Flushes and ends; `state` is the run's final state."""
        ...


@dataclass(frozen=True)
class History:
    """What the files of a run hold: the rows that count, in step order."""

    steps: Sequence[StepRow] = ()
    evals: Sequence[EvalRow] = ()


@dataclass(frozen=True)
class SinkRun:
    """A run as sinks know it.

    Attributes:
        name: Name of the run.
        project: `monitor.project`.
        directory: Directory of this machine in which a sink may keep files.
        config: Resolved config, to be shown.
        read_history: Reads the rows from the run's files; a sink sends again what it may have lost.
    """

    name: str
    project: str
    directory: Path
    config: Mapping[str, Any]
    read_history: Callable[[], History]


def step_numbers(row: StepRow) -> dict[str, float]:
    """Return the numbers of a step by their names in a sink, such as `train/loss`; what is None is left out."""
    values = row.to_dict().items()
    return {
        name if name.startswith(_NAMED_ALREADY) else f"{_GROUPS.get(name, 'train')}/{name}": value
        for name, value in values
        if name not in _NO_NUMBERS and value is not None
    }


def eval_numbers(row: EvalRow) -> dict[str, float]:
    """Return the numbers of an evaluation by their names in a sink, such as `eval/eval_loss`."""
    return {f"eval/{name}": value for name, value in row.metrics.items() if value is not None}
