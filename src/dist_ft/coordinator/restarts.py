"""Whether a group that failed is formed again: a pure rule over the failures so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dist_ft.config.schema import FailureConfig
from dist_ft.errors import DistFtError

_LONGEST_WAIT_S = 60.0


@dataclass(frozen=True)
class Failure:
    """How one attempt failed.

    Attributes:
        step: Completed steps at that moment.
        error: What went wrong.
    """

    step: int
    error: DistFtError


@dataclass(frozen=True)
class Decision:
    """What follows a failure.

    Attributes:
        is_restart: Form the group again; otherwise the run fails.
        reason: For ledger and console.
        wait_s: Seconds to wait first.
    """

    is_restart: bool
    reason: str
    wait_s: float = 0.0


def find_cause(failures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the failure that explains the others.

    That another driver has taken over comes first; then what a rank says of its own input; then a death, because
    its peers only say that their connection broke; then whoever spoke first.
    """
    overtaken = [f for f in failures if f["type"] == "StaleAttemptError"]
    own = [f for f in failures if f["type"] != "WorkerCrashError"]
    deaths = [f for f in failures if f["is_death"]]
    return (overtaken or own or deaths or list(failures))[0]


def decide_restart(failures: Sequence[Failure], config: FailureConfig) -> Decision:
    """Decides after the newest of the failures of this driver's attempts, oldest first."""
    last = failures[-1]
    if not last.error.retryable:
        return Decision(False, f"{type(last.error).__name__} is not retried: the same input would give it again")
    if len(failures) > config.max_restarts:
        return Decision(False, f"failure.max_restarts={config.max_restarts} restarts are used up")
    in_a_row = len(list(takewhile(lambda failure: failure.step == last.step, reversed(failures))))
    if in_a_row >= config.max_same_step:
        return Decision(False, f"{in_a_row} failures in a row after step {last.step} (failure.max_same_step)")
    wait_s = min(_LONGEST_WAIT_S, config.backoff_s * 2 ** (in_a_row - 2)) if in_a_row > 1 else 0.0
    return Decision(True, f"restart {len(failures)} of at most {config.max_restarts}", wait_s)


class Recovery:
    """The failures of this driver's attempts, and what follows the newest.

    Attributes:
        decision: What follows the failure of the current attempt; None while it has not failed.
    """

    def __init__(self, config: FailureConfig) -> None:
        self.decision: Decision | None = None
        self._config = config
        self._failures: list[Failure] = []
        self._not_before = 0.0

    def decide(self, failure: Failure, is_stopping: bool, now: float) -> Decision:
        """Decides after a failure; `now` in monotonic seconds."""
        self._failures.append(failure)
        decision = decide_restart(self._failures, self._config)
        if is_stopping:
            decision = Decision(False, "it failed while it was stopping; --resume goes on after the last checkpoint")
        self.decision, self._not_before = decision, now + decision.wait_s
        return decision

    def may_open(self, now: float) -> bool:
        """Whether the wait before the next attempt is over."""
        return now >= self._not_before
