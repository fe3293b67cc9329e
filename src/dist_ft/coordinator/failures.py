"""Decides which failure explains the others, and whether a new group is formed. Pure.

When one rank fails, its peers fail too: they report a broken connection, or their supervisors end them. One ordered
list of causes serves both the decision and the message to the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from dist_ft.config.cluster_sections import FailureConfig
from dist_ft.errors import (
    DistFtError,
    DivergedError,
    NodeLostError,
    OutOfMemoryError,
    StaleAttemptError,
    WorkerCrashError,
    from_dict,
)

_FIRST_CAUSES: tuple[type[DistFtError], ...] = (StaleAttemptError,)  # another driver has the run now
_LATER_CAUSES: tuple[type[DistFtError], ...] = (OutOfMemoryError, NodeLostError)
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class RankFailure:
    """Describes how one rank of an attempt failed.

    Attributes:
        rank: Index of the rank.
        type: Class of the error.
        message: Message of the error.
        is_death: Whether the rank reported nothing itself, and its supervisor found it dead.
        step: The step whose numbers were bad.
    """

    rank: int
    type: str
    message: str
    is_death: bool = False
    step: int | None = None

    @classmethod
    def of(cls, rank: int, error: DistFtError, is_death: bool = False) -> RankFailure:
        """Return the failure of a rank with an error."""
        return cls(rank, type(error).__name__, str(error), is_death)

    @property
    def error(self) -> DistFtError:
        """Return the error."""
        return from_dict({"type": self.type, "message": self.message})


def find_causes(failures: Sequence[RankFailure]) -> list[RankFailure]:
    """Return the failures that explain the others, in order of arrival; `failures` must not be empty."""
    best = min(_weight(failure) for failure in failures)
    return [failure for failure in failures if _weight(failure) == best]


def explain(failures: Sequence[RankFailure]) -> DistFtError:
    """Return the cause as one error; equal messages of several ranks are shown once, with their ranks."""
    causes = find_causes(failures)
    ranks: dict[str, list[int]] = {}
    for failure in causes:
        if failure.type == causes[0].type:
            ranks.setdefault(failure.message, []).append(failure.rank)
    lines = [f"ranks {sorted(set(of_message))}: {message}" for message, of_message in ranks.items()]
    return from_dict({"type": causes[0].type, "message": "\n".join(lines)})


def _weight(failure: RankFailure) -> int:
    """Return the place of a failure in the order of causes; a smaller number explains more."""
    error = type(failure.error)
    if error in _FIRST_CAUSES:
        return 0
    if not error.retryable:  # the rank reports its own input or numbers
        return 1
    if error in _LATER_CAUSES:
        return 2 + _LATER_CAUSES.index(error)
    if error is not WorkerCrashError:
        return 4
    return 5 if failure.is_death else 6  # peers of a dead rank only report a broken connection


@dataclass(frozen=True)
class AttemptFailure:
    """Describes how one attempt failed.

    Attributes:
        step: Completed steps at that moment.
        error: The cause.
        bad_step: The step whose numbers were bad, for a DivergedError.
    """

    step: int
    error: DistFtError
    bad_step: int | None = None


@dataclass(frozen=True)
class Decision:
    """Describes what follows a failure.

    Attributes:
        is_restart: Whether a new group is formed; otherwise the run fails.
        reason: Reason for ledger and console.
        wait_s: Seconds to wait first.
        skip_step: Step whose update is skipped from now on.
    """

    is_restart: bool
    reason: str
    wait_s: float = 0.0
    skip_step: int | None = None


def decide_restart(failures: Sequence[AttemptFailure], config: FailureConfig) -> Decision:
    """Decide what follows the last of `failures`, which are those of this driver's attempts, oldest first."""
    last = failures[-1]
    if isinstance(last.error, DivergedError):
        return _decide_bad_numbers(failures, config)
    if not last.error.retryable:
        return Decision(False, f"{type(last.error).__name__} is not retried: the same input would give it again")
    key, budget = _budget(last, config)
    alike = [failure for failure in failures if _budget(failure, config)[0] == key]
    if len(alike) > budget:
        return Decision(False, f"the restarts of failure.{key}={budget} are used up")
    in_a_row = len(list(takewhile(lambda failure: failure.step == last.step, reversed(failures))))
    # The loss of a machine is not a fault of the run.
    if in_a_row >= config.max_same_step and key != "max_node_losses":
        return Decision(False, f"{in_a_row} failures in a row after step {last.step} (failure.max_same_step)")
    wait_s = min(_LONGEST_WAIT_S, config.backoff_s * 2 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
    return Decision(True, f"restart {len(alike)} of failure.{key}={budget}", wait_s)


def _budget(failure: AttemptFailure, config: FailureConfig) -> tuple[str, int]:
    """Return the config key that limits restarts after this kind of failure, and its value."""
    if isinstance(failure.error, NodeLostError):
        return "max_node_losses", config.max_node_losses
    if isinstance(failure.error, OutOfMemoryError):
        return "max_out_of_memory", config.max_out_of_memory
    if isinstance(failure.error, DivergedError):
        return "max_bad_numbers", config.max_bad_numbers
    return "max_restarts", config.max_restarts


def _decide_bad_numbers(failures: Sequence[AttemptFailure], config: FailureConfig) -> Decision:
    last = failures[-1]
    if config.bad_numbers == "fail" or last.bad_step is None:
        return Decision(False, "bad numbers are not retried (failure.bad_numbers=fail)")
    alike = [failure for failure in failures if isinstance(failure.error, DivergedError)]
    if len(alike) > config.max_bad_numbers:
        return Decision(False, f"bad numbers more than failure.max_bad_numbers={config.max_bad_numbers} times")
    if config.bad_numbers == "skip_batch":
        return Decision(True, f"back to the last checkpoint, without step {last.bad_step}", 0.0, last.bad_step)
    if any(failure.bad_step == last.bad_step for failure in alike[:-1]):
        return Decision(
            False,
            f"step {last.bad_step} gave the same again after a roll-back, so it is no passing fault; lower "
            "optimizer.lr, look at its rows, or leave it out with failure.bad_numbers=skip_batch",
        )
    return Decision(True, f"back to the last checkpoint, bad numbers {len(alike)} of at most {config.max_bad_numbers}")


class Recovery:
    """Keeps the failures of this driver's attempts, and the decision after the newest.

    Attributes:
        decision: Decision after the failure of the current attempt; None while it has not failed.
    """

    def __init__(self, config: FailureConfig) -> None:
        self.decision: Decision | None = None
        self._config = config
        self._failures: list[AttemptFailure] = []
        self._not_before = 0.0

    def decide(self, failure: AttemptFailure, is_stopping: bool, now: float) -> Decision:
        """Decide after a failure; `now` in monotonic seconds."""
        self._failures.append(failure)
        decision = decide_restart(self._failures, self._config)
        if is_stopping:
            decision = Decision(False, "it failed while it was stopping; --resume goes on after the last checkpoint")
        self.decision, self._not_before = decision, now + decision.wait_s
        return decision

    def go_on(self, reason: str) -> Decision:
        """Decide to form a new group after an end that was not a failure."""
        self.decision = Decision(True, reason)
        return self.decision

    def may_open(self, now: float) -> bool:
        """Return whether the wait before the next attempt is over."""
        return now >= self._not_before
