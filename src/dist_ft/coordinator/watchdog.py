"""Which ranks make no progress: a pure rule over what ranks last reported.

A rank that waits in a collective is not the culprit; the one whose step or phase is behind is. Limits are
generous constants for now: they end a hang, they do not tune recovery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PHASES = ("start", "load", "evaluate", "save", "first_step", "step", "drain")
"""In the order in which a rank goes through them after the same number of steps."""
LIMITS_S = {"start": 600.0, "load": 3600.0, "first_step": 1800.0, "step": 1800.0, "evaluate": 7200.0,
            "save": 3600.0, "drain": 3600.0}  # fmt: skip


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


def find_stalled(views: Iterable[RankView], now: float) -> RankView | None:
    """Returns the rank that is furthest behind, when it is over the limit of its own phase.

    The others wait for it; how long a wait may last is the limit of what they wait for.
    """
    last = min(views, key=lambda view: (view.step, PHASES.index(view.phase), view.since), default=None)
    return last if last is not None and now - last.since > LIMITS_S[last.phase] else None
