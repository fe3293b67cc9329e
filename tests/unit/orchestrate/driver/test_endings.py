"""How a driver ends: state, error, exit code and last ledger event of everything that can end it."""

from __future__ import annotations

import pytest

from dist_ft.errors import (
    CapacityError,
    CoordinatorLostError,
    DataError,
    DistFtError,
    DivergedError,
    OutOfMemoryError,
    StaleAttemptError,
    StorageError,
    WorkerCrashError,
)
from dist_ft.orchestrate.driver.endings import FAILURES, Ending, Records, ending_of
from dist_ft.run.outcome import RunResult


def exit_code(ending: Ending) -> int:
    """What `dist-ft train` ends with."""
    return RunResult("d", ending.state, error=ending.error.to_dict() if ending.error else None).exit_code


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("stopped", 3)])
def test_a_run_without_a_failure(state: str, code: int) -> None:
    ending = Ending(state)
    assert (exit_code(ending), ending.event, ending.error, ending.records) == (code, state, None, Records.OURS)


@pytest.mark.parametrize(
    ("failure", "error", "event", "records"),
    [
        (DivergedError("loss is nan"), DivergedError("loss is nan"), "failed", Records.OURS),
        (DataError("row 3"), DataError("row 3"), "failed", Records.OURS),
        (CapacityError("too few"), CapacityError("too few"), "failed", Records.OURS),
        (OutOfMemoryError("rank 0"), OutOfMemoryError("rank 0"), "failed", Records.OURS),
        (WorkerCrashError("rank 1"), WorkerCrashError("rank 1"), "failed", Records.OURS),
        (OSError(28, "No space left"), StorageError("[Errno 28] No space left"), "failed", Records.OURS),
        (StorageError("refused"), StorageError("refused"), "failed", Records.OURS),
        (
            KeyboardInterrupt(),
            DistFtError("interrupted at once; --resume goes on after the last checkpoint"),
            "failed",
            Records.OURS,
        ),
        # The run is another driver's: this one writes nothing more.
        (StaleAttemptError("attempt 3"), StaleAttemptError("attempt 3"), None, Records.ANOTHERS),
        (CoordinatorLostError("died"), CoordinatorLostError("died"), None, Records.OUT_OF_REACH),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_run_with_a_failure(failure: BaseException, error: DistFtError, event: str | None, records: Records) -> None:
    ending = ending_of(failure)
    assert isinstance(failure, FAILURES)
    assert (ending.state, ending.event, ending.records) == ("failed", event, records)
    assert ending.error is not None and ending.error.to_dict() == error.to_dict()
    assert exit_code(ending) == error.exit_code != 0


def test_an_error_of_our_own_is_not_an_ending() -> None:
    assert not isinstance(KeyError("bug"), FAILURES)
