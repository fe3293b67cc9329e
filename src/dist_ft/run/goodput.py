"""Computes goodput: the time of the steps that count, divided by the time that drivers were at work.

The time between two drivers (a run that was stopped overnight) does not count. A step that was repeated counts once.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping

from dist_ft.metric_rows import StepRow


class Goodput:
    """Adds up the steps of a run.

    Args:
        rows: The valid row of each step so far.
        active_s: Seconds that earlier drivers were at work.
        began: Monotonic time at which this driver began, in seconds.
    """

    def __init__(self, rows: Mapping[int, StepRow], active_s: float, began: float) -> None:
        self._sums = array("d", [0.0])  # seconds of the first n steps
        self._earlier_s = active_s
        self._began = began
        for step in range(1, len(rows) + 1):
            if step not in rows:  # the run has lost its first rows
                break
            self.add(step, rows[step].step_s)

    def add(self, step: int, seconds: float) -> None:
        """Record the duration of a step, and forgets this step and later ones if they were recorded before."""
        del self._sums[step:]
        while len(self._sums) < step:
            self._sums.append(self._sums[-1])
        self._sums.append(self._sums[-1] + seconds)

    def active_s(self, now: float) -> float:
        """Return the seconds that drivers have been at work."""
        return self._earlier_s + now - self._began

    def useful_s(self, step: int) -> float:
        """Return the seconds of the first `step` steps."""
        return self._sums[min(step, len(self._sums) - 1)]

    def value(self, step: int, now: float) -> float:
        """Return the goodput after `step` steps, 0 to 1."""
        return self.useful_s(step) / max(self.active_s(now), 1e-9)
