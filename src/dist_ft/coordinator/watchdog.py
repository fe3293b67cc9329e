"""Which ranks make no progress: a pure rule over what ranks last reported.

A rank that waits in a collective is not the culprit; the one whose step or phase is behind is. A step is judged by
the run's own steps, the other phases by generous constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

PHASES = ("start", "load", "evaluate", "save", "first_step", "step", "drain")
"""In the order in which a rank goes through them after the same number of steps."""
LIMITS_S = {"start": 600.0, "load": 3600.0, "first_step": 1800.0, "step": 1800.0, "evaluate": 7200.0,
            "save": 3600.0, "drain": 3600.0}  # fmt: skip
_STEPS_TO_JUDGE = 5


@dataclass(frozen=True)
class RankView:
    """What is known of a rank.

    Attributes:
        rank: Its index.
        phase: One of `PHASES`.
        step: Completed steps.
        since: Monotonic time of its last progress, in seconds.
    """

    rank: int
    phase: str
    step: int
    since: float


def step_limit(recent_s: Sequence[float], configured_s: float | None) -> float:
    """Returns the seconds that a step may take.

    Args:
        recent_s: Seconds of the steps of this attempt so far.
        configured_s: `failure.step_limit_s`.
    """
    if configured_s is not None:
        return configured_s
    return 3 * median(recent_s) + 10 if len(recent_s) >= _STEPS_TO_JUDGE else LIMITS_S["step"]


def find_stalled(views: Iterable[RankView], now: float, step_limit_s: float) -> RankView | None:
    """Returns the rank that is furthest behind, when it is over the limit of its own phase.

    The others wait for it; how long a wait may last is the limit of what they wait for.
    """
    last = min(views, key=lambda view: (view.step, PHASES.index(view.phase), view.since), default=None)
    if last is None:
        return None
    limit = step_limit_s if last.phase == "step" else LIMITS_S[last.phase]
    return last if now - last.since > limit else None
