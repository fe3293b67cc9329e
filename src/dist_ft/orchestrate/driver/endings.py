"""Decides how a driver ends: a table from failures to the state, the error and the records of the run. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from dist_ft.errors import CoordinatorLostError, DistFtError, StaleAttemptError, StorageError


class Records(Enum):
    """Says who owns the records of the run at the end of a driver."""

    OURS = "ours"
    """This driver owns them: the result is read from them, and the coordinator closes them."""
    ANOTHERS = "another's"
    """Another driver has taken over the run. Its numbers do not describe this driver, which writes no more."""
    OUT_OF_REACH = "out of reach"
    """The coordinator is lost; nobody can close them."""


@dataclass(frozen=True)
class Ending:
    """Describes how a driver ends.

    Attributes:
        state: Final state of the run; also the name of its last ledger event if this driver owns the records.
        error: Why the run failed; the class of the error has the exit code.
        records: Owner of the records.
    """

    state: Literal["completed", "stopped", "failed"]
    error: DistFtError | None = None
    records: Records = Records.OURS

    @property
    def event(self) -> str | None:
        """Name of the last ledger event; None if this driver writes none."""
        return self.state if self.records is Records.OURS else None


_INTERRUPTED = "interrupted at once; --resume goes on after the last checkpoint"

# The first row that fits counts. Anything else is an error of dist-ft itself and is not caught.
_FAILURES: tuple[tuple[type[BaseException], Callable[[Any], DistFtError], Records], ...] = (
    (StaleAttemptError, lambda failure: failure, Records.ANOTHERS),
    (CoordinatorLostError, lambda failure: failure, Records.OUT_OF_REACH),
    (DistFtError, lambda failure: failure, Records.OURS),
    (KeyboardInterrupt, lambda _: DistFtError(_INTERRUPTED), Records.OURS),
    # An error of the file system or the store, after the training.
    (OSError, lambda failure: StorageError(str(failure)), Records.OURS),
)
FAILURES = tuple(kind for kind, _, _ in _FAILURES)
"""Exceptions that end a run; the driver catches them."""


def ending_of(failure: BaseException) -> Ending:
    """Return how a driver ends after a failure, which is one of `FAILURES`."""
    error, records = next((error, records) for kind, error, records in _FAILURES if isinstance(failure, kind))
    return Ending("failed", error(failure), records)
