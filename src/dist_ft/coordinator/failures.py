"""Decides which failure explains the others, and whether the group is formed again.

When one rank fails, its peers fail too: they say that a connection broke, or are ended by their supervisors. One
ordered list of causes serves the decision and the message that a person reads. Everything here is pure.
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

_FIRST_CAUSES: tuple[type[DistFtError], ...] = (StaleAttemptError,)  # the run is another driver's now
_LATER_CAUSES: tuple[type[DistFtError], ...] = (OutOfMemoryError, NodeLostError)
_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class RankFailure:
    """How one rank of an attempt failed.

    Attributes:
        rank: Its index.
        type: Class of the error.
        message: What the error says.
        is_death: The rank said nothing itself; its supervisor found it dead.
        step: The step whose numbers were bad.
    """

    rank: int
    type: str
    message: str
    is_death: bool = False
    step: int | None = None

    @classmethod
    def of(cls, rank: int, error: DistFtError, is_death: bool = False) -> RankFailure:
        """Make the failure of a rank from an error."""
        return cls(rank, type(error).__name__, str(error), is_death)

    @property
    def error(self) -> DistFtError:
        """The error itself."""
        return from_dict({"type": self.type, "message": self.message})


def find_causes(failures: Sequence[RankFailure]) -> list[RankFailure]:
    """Return the failures that explain the others, in the order in which they became known; at least one is given."""
    best = min(_weight(failure) for failure in failures)
    return [failure for failure in failures if _weight(failure) == best]


def explain(failures: Sequence[RankFailure]) -> DistFtError:
    """Return the cause as one error: what many ranks say alike is said once, with their ranks."""
    causes = find_causes(failures)
    ranks: dict[str, list[int]] = {}
    for failure in causes:
        if failure.type == causes[0].type:
            ranks.setdefault(failure.message, []).append(failure.rank)
    lines = [f"ranks {sorted(set(of_message))}: {message}" for message, of_message in ranks.items()]
    return from_dict({"type": causes[0].type, "message": "\n".join(lines)})


def _weight(failure: RankFailure) -> int:
    """Return the place of a failure in the order of causes; a smaller one explains more."""
    error = type(failure.error)
    if error in _FIRST_CAUSES:
        return 0
    if not error.retryable:  # what a rank says of its own input or numbers
        return 1
    if error in _LATER_CAUSES:
        return 2 + _LATER_CAUSES.index(error)
    if error is not WorkerCrashError:
        return 4
    return 5 if failure.is_death else 6  # peers of a dead rank only say that their connection broke


@dataclass(frozen=True)
class AttemptFailure:
    """How one attempt failed.

    Attributes:
        step: Completed steps at that moment.
        error: What went wrong.
        bad_step: The step whose numbers were bad, for a DivergedError.
    """

    step: int
    error: DistFtError
    bad_step: int | None = None


@dataclass(frozen=True)
class Decision:
    """What follows a failure.

    Attributes:
        is_restart: Form the group again; otherwise the run fails.
        reason: For ledger and console.
        wait_s: Seconds to wait first.
        skip_step: Step whose update is left out from now on.
    """

    is_restart: bool
    reason: str
    wait_s: float = 0.0
    skip_step: int | None = None


def decide_restart(failures: Sequence[AttemptFailure], config: FailureConfig) -> Decision:
    """Decide after the newest of the failures of this driver's attempts, oldest first."""
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
    # Machines come and go without any fault of the run.
    if in_a_row >= config.max_same_step and key != "max_node_losses":
        return Decision(False, f"{in_a_row} failures in a row after step {last.step} (failure.max_same_step)")
    wait_s = min(_LONGEST_WAIT_S, config.backoff_s * 2 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
    return Decision(True, f"restart {len(alike)} of failure.{key}={budget}", wait_s)


def _budget(failure: AttemptFailure, config: FailureConfig) -> tuple[str, int]:
    """Return the key that limits restarts after such a failure, and its value."""
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
    """The failures of this driver's attempts, and what follows the newest.

    Attributes:
        decision: What follows the failure of the current attempt; None while it has not failed.
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
        """Decide to form the group again after an end that is no failure."""
        self.decision = Decision(True, reason)
        return self.decision

    def may_open(self, now: float) -> bool:
        """Whether the wait before the next attempt is over."""
        return now >= self._not_before
