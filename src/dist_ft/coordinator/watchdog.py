"""Finds the ranks that make no progress, and those that are slow, by what they last reported. Reads no clock.

A rank that waits in a collective is not the culprit; the one whose step or phase is behind is. Within a step all look
alike from here, and their supervisors are asked where they are. A step is judged by the run's own steps, the other
phases by the longest so far, and by generous constants while there was none.
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
"""From which on this process itself was held up, and nobody's silence can be judged."""
_LEAST_S = 600.0
"""However fast a phase was so far: a disk may stall for minutes and recover."""
_STEP_SLACK_S = 10.0
_ANSWER_LIMIT_S = 2.0
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
        """Note a step."""
        self.step_s.setdefault(world_size, deque(maxlen=50)).append(seconds)

    def add_phase(self, phase: Phase, seconds: float) -> None:
        """Note the end of a phase."""
        self.longest_s[phase] = max(seconds, self.longest_s.get(phase, 0.0))

    def median_step_s(self, world_size: int) -> float | None:
        """Return the seconds of an ordinary step at this size; None before there were some."""
        seen = self.step_s.get(world_size, ())
        return median(seen) if len(seen) >= _STEPS_TO_JUDGE else None


class RankProgress:
    """The phases and steps of the ranks of one attempt, and which of them are late.

    Args:
        world_size: Number of ranks.
        limits: `failure.limits`.
        history: How long things take, noted here and judged by.
        stacks_dir: Where supervisors write down where their ranks are, as a person is told.
        now: Monotonic time in seconds.
    """

    def __init__(self, world_size: int, limits: PhaseLimits, history: History, stacks_dir: str, now: float) -> None:
        self._world_size = world_size
        self._limits = limits
        self._history = history
        self._stacks_dir = stacks_dir
        self._views = {rank: RankView(rank, Phase.START, 0, now) for rank in range(world_size)}
        self._entered = dict.fromkeys(self._views, now)  # when each rank entered its phase
        self._heard: dict[int, float] = {}  # when each rank's supervisor last said anything
        self._looked_at = now
        self._asked_at: float | None = None  # when supervisors were asked where their ranks are
        self._states: dict[int, Whereabouts] = {}  # what they have said

    @property
    def phases(self) -> list[Phase]:
        """What the ranks do now, each phase once."""
        return sorted({view.phase for view in self._views.values()})

    @property
    def is_asking(self) -> bool:
        """Whether supervisors are to write down where their ranks are, and to say it."""
        return self._asked_at is not None

    def hear(self, rank: int, now: float) -> None:
        """Record that a rank's supervisor lives."""
        self._heard[rank] = now

    def enter(self, rank: int, phase: Phase, now: float, step: int | None = None) -> None:
        """Note the phase of a rank, after the same number of steps if `step` is None."""
        old = self._views[rank]
        if phase != old.phase:
            self._history.add_phase(old.phase, now - self._entered[rank])
            self._entered[rank] = now
        self._views[rank] = RankView(rank, phase, old.step if step is None else step, now)

    def finish_step(self, step: int, now: float) -> None:
        """Note a step of all ranks: the all-reduce at its end proves that every rank got there."""
        for rank, view in self._views.items():
            self._views[rank] = RankView(rank, view.phase, max(view.step, step), now)

    def locate(self, rank: int, state: Whereabouts) -> None:
        """Note where a supervisor found its rank."""
        self._states[rank] = state

    def find_late(self, ended: Collection[int], now: float) -> list[RankFailure]:
        """Return the failures of ranks that make no progress; an empty list while all do, or may yet answer.

        Args:
            ended: Ranks that are not waited for.
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
    """Return the ranks that are furthest behind, as far as they are over the limit of their own phase.

    The others wait for them; how long a wait may last is the limit of what they wait for. Those that were silent
    longest come first.
    """
    ordered = sorted(views, key=lambda view: (*_place(view), view.since))
    behind = [view for view in ordered if _place(view) == _place(ordered[0])]
    return [view for view in behind if now - view.since > limit_of(view.phase)]


def find_culprits(behind: Sequence[int], states: Mapping[int, Whereabouts]) -> list[int]:
    """Return which of several ranks that are equally far behind hold the others up.

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
    """Return the slowest rank and how many times the median rank's time it takes, if that is `_SLOW` or more.

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
