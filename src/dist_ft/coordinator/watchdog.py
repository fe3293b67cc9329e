"""Which ranks make no progress, and which are slow: pure rules over what ranks last reported.

A rank that waits in a collective is not the culprit; the one whose step or phase is behind is. Within a step all look
alike from here, and their supervisors are asked where they are. A step is judged by the run's own steps, the other
phases by the longest so far, and by generous constants while there was none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from dist_ft.config.cluster_sections import PhaseLimits
from dist_ft.messages import Phase, Whereabouts

_LIMITS_S = {
    Phase.LOAD: 3600.0, Phase.DATA: 7200.0, Phase.FIRST_STEP: 1800.0, Phase.STEP: 1800.0, Phase.EVALUATE: 7200.0,
    Phase.SAVE: 3600.0,
}  # fmt: skip
_ORDER = tuple(Phase)
_LEAST_S = 600.0
"""However fast a phase was so far: a disk may stall for minutes and recover."""
_STEP_SLACK_S = 10.0
ANSWER_LIMIT_S = 2.0
"""For supervisors to say where their ranks are; part of the slack."""
_STEPS_TO_JUDGE = 5
STEPS_TO_COMPARE = 20
"""Steps over which ranks are compared."""
_SLOW = 2.0
"""Times the median rank from which on a rank is called slow."""


@dataclass(frozen=True)
class RankView:
    """What is known of a rank.

    Attributes:
        rank: Its index.
        phase: What it does.
        step: Completed steps.
        since: Monotonic time of its last progress, in seconds.
    """

    rank: int
    phase: Phase
    step: int
    since: float


@dataclass
class History:
    """How long things have taken in this run, over all attempts of this driver.

    Attributes:
        step_s: Seconds of the last steps, by world size.
        longest_s: Seconds of the longest visit, by phase.
    """

    step_s: dict[int, deque[float]] = field(default_factory=dict)
    longest_s: dict[Phase, float] = field(default_factory=dict)

    def add_step(self, world_size: int, seconds: float) -> None:
        """Notes a step."""
        self.step_s.setdefault(world_size, deque(maxlen=50)).append(seconds)

    def add_phase(self, phase: Phase, seconds: float) -> None:
        """Notes the end of a phase."""
        self.longest_s[phase] = max(seconds, self.longest_s.get(phase, 0.0))

    def median_step_s(self, world_size: int) -> float | None:
        """Returns the seconds of an ordinary step at this size; None before there were some."""
        seen = self.step_s.get(world_size, ())
        return median(seen) if len(seen) >= _STEPS_TO_JUDGE else None


def phase_limit(phase: Phase, world_size: int, limits: PhaseLimits, history: History) -> float:
    """Returns the seconds that a rank may spend in a phase before its supervisor is asked where it is."""
    configured: float | None = limits.model_dump()[f"{phase}_s"]
    if configured is not None:
        return configured
    if phase == Phase.STEP:
        usual = history.median_step_s(world_size)
        return _LIMITS_S[Phase.STEP] if usual is None else 3 * usual + _STEP_SLACK_S - ANSWER_LIMIT_S
    longest = history.longest_s.get(phase)
    return _LIMITS_S[phase] if longest is None else min(_LIMITS_S[phase], max(_LEAST_S, 10 * longest))


def find_stalled(views: Iterable[RankView], now: float, limit_of: Callable[[Phase], float]) -> list[RankView]:
    """Returns the ranks that are furthest behind, as far as they are over the limit of their own phase.

    The others wait for them; how long a wait may last is the limit of what they wait for. Those that were silent
    longest come first.
    """
    ordered = sorted(views, key=lambda view: (*_place(view), view.since))
    behind = [view for view in ordered if _place(view) == _place(ordered[0])]
    return [view for view in behind if now - view.since > limit_of(view.phase)]


def find_culprits(behind: Sequence[int], states: Mapping[int, Whereabouts]) -> list[int]:
    """Returns which of several ranks that are equally far behind hold the others up.

    Args:
        behind: The ranks.
        states: What their supervisors found; no word is worse than any.
    """
    for state in ("stopped", None, "works"):
        if found := [rank for rank in behind if states.get(rank) == state]:
            return found
    return list(behind)


def _place(view: RankView) -> tuple[int, int]:
    return view.step, _ORDER.index(view.phase)


def find_straggler(local_s: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    """Returns the slowest rank and how many times the median rank's time it takes, if that is `_SLOW` or more.

    Args:
        local_s: Of the last steps, the seconds of each rank until it first waited for another [steps, ranks].
    """
    if len(local_s) < STEPS_TO_COMPARE or len(local_s[0]) < 2:
        return None
    of_rank = [median(times) for times in zip(*local_s, strict=True)]
    slowest = max(range(len(of_rank)), key=of_rank.__getitem__)
    others = median(seconds for rank, seconds in enumerate(of_rank) if rank != slowest)
    ratio = of_rank[slowest] / max(others, 1e-6)
    return (slowest, ratio) if ratio >= _SLOW else None
