"""Finds ranks without progress and slow ranks from their last reports. Reads no clock.

A rank that waits in a collective is not the culprit; the rank whose step or phase is behind is. Within a step all ranks
look alike from here, so their supervisors are asked where they are. A step is judged by the run's own steps, another
phase by the longest one so far, or by generous constants before the first one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from dist_ft.config.cluster_sections import PhaseLimits
from dist_ft.coordinator.failures import RankFailure
from dist_ft.errors import StalledError
from dist_ft.layout import stacks_name
from dist_ft.messages import Phase, Whereabouts

_LIMITS_S = {
    Phase.LOAD: 3600.0, Phase.DATA: 7200.0, Phase.FIRST_STEP: 1800.0, Phase.STEP: 1800.0, Phase.EVALUATE: 7200.0,
    Phase.SAVE: 3600.0,
}  # fmt: skip
_ORDER = tuple(Phase)
_LOOKS_APART_S = 5.0
"""Gap between two checks from which this process itself was held up, so that it cannot judge silence."""
_LEAST_S = 600.0
"""Lower bound of a limit that follows from the phases so far, because a disk may stall for minutes and recover."""
_STEP_SLACK_S = 10.0
_ANSWER_LIMIT_S = 2.0
"""Time for supervisors to report where their ranks are; part of the slack."""
_STEPS_TO_JUDGE = 5
STEPS_TO_COMPARE = 20
"""Steps over which ranks are compared."""
_SLOW = 2.0
"""Factor over the median of the other ranks from which a rank is called slow."""


@dataclass(frozen=True)
class RankView:
    """Holds what is known of a rank.

    Attributes:
        rank: Index of the rank.
        phase: Its current phase.
        step: Completed steps.
        since: Monotonic time of its last progress, in seconds.
    """

    rank: int
    phase: Phase
    step: int
    since: float


@dataclass
class History:
    """Holds the durations of steps and phases in this run, over all attempts of this driver.

    Attributes:
        step_s: Seconds of the last steps, by world size.
        longest_s: Seconds of the longest visit, by phase.
    """

    step_s: dict[int, deque[float]] = field(default_factory=dict)
    longest_s: dict[Phase, float] = field(default_factory=dict)

    def add_step(self, world_size: int, seconds: float) -> None:
        """Record the duration of a step."""
        self.step_s.setdefault(world_size, deque(maxlen=50)).append(seconds)

    def add_phase(self, phase: Phase, seconds: float) -> None:
        """Record the duration of a phase."""
        self.longest_s[phase] = max(seconds, self.longest_s.get(phase, 0.0))

    def median_step_s(self, world_size: int) -> float | None:
        """Return the median seconds of a step at this world size; None before there are enough steps."""
        seen = self.step_s.get(world_size, ())
        return median(seen) if len(seen) >= _STEPS_TO_JUDGE else None


class RankProgress:
    """Tracks the phases and steps of the ranks of one attempt, and finds the late ones.

    Args:
        world_size: Number of ranks.
        limits: `failure.limits`.
        history: Durations of steps and phases, which are recorded here and used as limits.
        stacks_dir: Folder of the stacks that supervisors write, as shown in messages.
        now: Monotonic time in seconds.
    """

    def __init__(self, world_size: int, limits: PhaseLimits, history: History, stacks_dir: str, now: float) -> None:
        self._world_size = world_size
        self._limits = limits
        self._history = history
        self._stacks_dir = stacks_dir
        self._views = {rank: RankView(rank, Phase.START, 0, now) for rank in range(world_size)}
        self._entered = dict.fromkeys(self._views, now)  # when each rank entered its phase
        self._heard: dict[int, float] = {}  # when each rank's supervisor last sent anything
        self._looked_at = now
        self._asked_at: float | None = None  # when supervisors were asked where their ranks are
        self._states: dict[int, Whereabouts] = {}  # their answers

    @property
    def phases(self) -> list[Phase]:
        """The phases that ranks are in now, each phase once."""
        return sorted({view.phase for view in self._views.values()})

    @property
    def is_asking(self) -> bool:
        """Whether supervisors should write the stacks of their ranks and report where the ranks are."""
        return self._asked_at is not None

    def hear(self, rank: int, now: float) -> None:
        """Record that a rank's supervisor is alive."""
        self._heard[rank] = now

    def enter(self, rank: int, phase: Phase, now: float, step: int | None = None) -> None:
        """Record the phase of a rank; `step` is its completed steps, None if unchanged."""
        old = self._views[rank]
        if phase != old.phase:
            self._history.add_phase(old.phase, now - self._entered[rank])
            self._entered[rank] = now
        self._views[rank] = RankView(rank, phase, old.step if step is None else step, now)

    def finish_step(self, step: int, now: float) -> None:
        """Record a step of all ranks: the all-reduce at its end proves that every rank finished it."""
        for rank, view in self._views.items():
            self._views[rank] = RankView(rank, view.phase, max(view.step, step), now)

    def locate(self, rank: int, state: Whereabouts) -> None:
        """Record where a supervisor found its rank."""
        self._states[rank] = state

    def find_late(self, ended: Collection[int], now: float) -> list[RankFailure]:
        """Return the failures of ranks without progress; an empty list if all make progress or may still answer.

        Args:
            ended: Ranks that have ended and are ignored.
            now: Monotonic time in seconds.
        """
        if now - self._looked_at > _LOOKS_APART_S:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked_at = now
        working = [view for rank, view in self._views.items() if rank not in ended]
        late = find_stalled(
            working, now, lambda phase: phase_limit(phase, self._world_size, self._limits, self._history)
        )
        if not late:
            self._asked_at, self._states = None, {}
        elif self._asked_at is None:
            self._asked_at = now
        elif all(view.rank in self._states for view in late) or now - self._asked_at > _ANSWER_LIMIT_S:
            culprits = find_culprits([view.rank for view in late], self._states)
            first = next(view for view in late if view.rank == culprits[0])
            error = StalledError(self._describe(first, culprits, now))
            return [RankFailure.of(rank, error) for rank in culprits]
        limit_s = self._limits.silence_s
        silent = [view.rank for view in working if now - self._heard.get(view.rank, now) > limit_s]
        error = StalledError(f"nothing was heard of the workers of ranks {silent} for {limit_s:.0f} s")
        return [RankFailure.of(rank, error) for rank in silent[:1]]

    def _describe(self, first: RankView, culprits: Sequence[int], now: float) -> str:
        if len(culprits) == 1:
            who, where = f"rank {first.rank} makes", f"where it is: {self._stacks_dir}/{stacks_name(first.rank)}"
        else:
            who, where = f"ranks {', '.join(map(str, sorted(culprits)))} make", f"where they are: {self._stacks_dir}"
        state = self._states.get(first.rank)
        how = " (stopped)" if state == "stopped" else " (its worker does not answer)" if state is None else ""
        late_s = now - first.since
        return f"{who} no progress in phase {first.phase} after step {first.step}, for {late_s:.0f} s{how}; {where}"


def phase_limit(phase: Phase, world_size: int, limits: PhaseLimits, history: History) -> float:
    """Return the seconds that a rank may spend in a phase before its supervisor is asked where it is."""
    configured: float | None = limits.model_dump()[f"{phase}_s"]
    if configured is not None:
        return configured
    if phase == Phase.STEP:
        usual = history.median_step_s(world_size)
        return _LIMITS_S[Phase.STEP] if usual is None else 3 * usual + _STEP_SLACK_S - _ANSWER_LIMIT_S
    longest = history.longest_s.get(phase)
    return _LIMITS_S[phase] if longest is None else min(_LIMITS_S[phase], max(_LEAST_S, 10 * longest))


def find_stalled(views: Iterable[RankView], now: float, limit_of: Callable[[Phase], float]) -> list[RankView]:
    """Return those of the ranks furthest behind that have exceeded the limit of their own phase.

    The other ranks wait for them, so the limit of a wait is the limit of the ranks that are waited for. The rank that
    was silent longest comes first.
    """
    ordered = sorted(views, key=lambda view: (*_place(view), view.since))
    behind = [view for view in ordered if _place(view) == _place(ordered[0])]
    return [view for view in behind if now - view.since > limit_of(view.phase)]


def find_culprits(behind: Sequence[int], states: Mapping[int, Whereabouts]) -> list[int]:
    """Return which of several ranks that are equally far behind hold up the others.

    Args:
        behind: The ranks.
        states: Answers of their supervisors; a missing answer counts as worse than `works`.
    """
    for state in ("stopped", None, "works"):
        if found := [rank for rank in behind if states.get(rank) == state]:
            return found
    return list(behind)


def _place(view: RankView) -> tuple[int, int]:
    return view.step, _ORDER.index(view.phase)


def find_straggler(local_s: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    """Return the slowest rank and its time over the median of the others, if that factor is `_SLOW` or more.

    Args:
        local_s: Seconds of each rank until it first waited for another, for the last steps [steps, ranks].
    """
    if len(local_s) < STEPS_TO_COMPARE or len(local_s[0]) < 2:
        return None
    of_rank = [median(times) for times in zip(*local_s, strict=True)]
    slowest = max(range(len(of_rank)), key=of_rank.__getitem__)
    others = median(seconds for rank, seconds in enumerate(of_rank) if rank != slowest)
    ratio = of_rank[slowest] / max(others, 1e-6)
    return (slowest, ratio) if ratio >= _SLOW else None
