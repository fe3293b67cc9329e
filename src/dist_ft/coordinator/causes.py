"""Which of several failures explains the others: one ordered list, for the decision and for what a person reads.

When one rank fails, its peers fail too: they say that a connection broke, or are ended by their supervisors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_ft import errors
from dist_ft.errors import DistFtError, NodeLostError, OutOfMemoryError, StaleAttemptError, WorkerCrashError

_FIRST_CAUSES: tuple[type[DistFtError], ...] = (StaleAttemptError,)  # the run is another driver's now
_LATER_CAUSES: tuple[type[DistFtError], ...] = (OutOfMemoryError, NodeLostError)


def find_causes(failures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the failures that explain the others, in the order in which they became known.

    Args:
        failures: `{rank, is_death, type, message}` of each; at least one.
    """
    best = min(_weight(failure) for failure in failures)
    return [failure for failure in failures if _weight(failure) == best]


def explain(failures: Sequence[dict[str, Any]]) -> DistFtError:
    """Returns the cause as one error: what many ranks say alike is said once, with their ranks."""
    causes = find_causes(failures)
    ranks: dict[str, list[int]] = {}
    for failure in causes:
        if failure["type"] == causes[0]["type"]:
            ranks.setdefault(failure["message"], []).append(failure["rank"])
    lines = [f"ranks {sorted(set(of_message))}: {message}" for message, of_message in ranks.items()]
    return errors.from_dict({"type": causes[0]["type"], "message": "\n".join(lines)})


def _weight(failure: dict[str, Any]) -> int:
    """Smaller explains more."""
    error = type(errors.from_dict(failure))
    if error in _FIRST_CAUSES:
        return 0
    if not error.retryable:  # what a rank says of its own input or numbers
        return 1
    if error in _LATER_CAUSES:
        return 2 + _LATER_CAUSES.index(error)
    if error is not WorkerCrashError:
        return 4
    return 5 if failure["is_death"] else 6  # peers of a dead rank only say that their connection broke
