"""Says when the next checkpoint is due: after a number of steps, or with `every_steps: auto` when it pays."""

from __future__ import annotations

import statistics
from collections import deque

from dist_ft.checkpoint.interval import optimal_interval_s

_FIRST_COST_S = 1.0
"""What a checkpoint is taken to cost before one was measured."""
_LEAST_COST_S = 1e-3
_COSTS = 5
_STEPS = 50
_TOLD = 0.25
"""A change of the interval by this share is worth an entry of the ledger."""


class AutoPace:
    """Measures what checkpoints cost and says when the next one is due. Rank 0 asks it; the others learn of it.

    The cost of a checkpoint is the time for which it holds the step up, and what the steps beside its writing take
    longer than those without one.

    Args:
        mtbf_s: Mean time between failures of the run.
        now: Monotonic time in seconds.
    """

    def __init__(self, mtbf_s: float, now: float) -> None:
        self.mtbf_s = mtbf_s
        self._saved_at = now
        self._quiet_s: deque[float] = deque(maxlen=_STEPS)  # steps beside which nothing was written
        self._costs: deque[float] = deque(maxlen=_COSTS)
        self._open_cost: float | None = None  # of the checkpoint that is being written
        self._writing_s = 0.0
        self._told_s: float | None = None

    @property
    def cost_s(self) -> float:
        """Seconds of training that a checkpoint costs: the median of the last ones."""
        return max(_LEAST_COST_S, statistics.median(self._costs)) if self._costs else _FIRST_COST_S

    @property
    def interval_s(self) -> float:
        """Seconds between two checkpoints; at least what writing one takes, because one is written at a time."""
        return max(optimal_interval_s(self.cost_s, self.mtbf_s), self._writing_s)

    @property
    def num_quiet_steps(self) -> int:
        """Steps that an interval has, at the pace of the last ones; at least 1."""
        step_s = statistics.median(self._quiet_s) if self._quiet_s else 0.0
        return max(1, round(self.interval_s / step_s)) if step_s else 1

    def is_due(self, now: float) -> bool:
        """Return whether the next checkpoint is due."""
        return now - self._saved_at >= self.interval_s

    def stepped(self, step_s: float, is_writing: bool, now: float) -> None:
        """Record the duration of a step, and whether a checkpoint was being written beside it."""
        if not is_writing:
            self._quiet_s.append(step_s)
            if self._open_cost is not None:
                self._costs.append(max(0.0, self._open_cost))
                self._writing_s, self._open_cost = now - self._saved_at - step_s, None
        elif self._open_cost is not None and self._quiet_s:
            self._open_cost += step_s - statistics.median(self._quiet_s)

    def saved(self, blocking_s: float, now: float) -> None:
        """Record that a checkpoint was begun, and for how long it held the step up."""
        self._saved_at, self._open_cost = now, blocking_s

    def is_news(self) -> bool:
        """Return whether the interval has changed since the last news; the first one is news."""
        new = self.interval_s
        if self._costs and (self._told_s is None or abs(new - self._told_s) > _TOLD * self._told_s):
            self._told_s = new
            return True
        return False
