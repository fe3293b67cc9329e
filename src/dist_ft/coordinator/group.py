"""What the coordinator knows of the ranks of the current attempt."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from dist_ft.coordinator.commit import Staging
from dist_ft.coordinator.watchdog import RankView


@dataclass
class GroupState:
    """What is known of the ranks of the current attempt.

    Attributes:
        world_size: Number of ranks; 0 before the first attempt.
        ranks: What each rank last reported.
        rendezvous: Where rank 0 listens, once known.
        abort: Why all ranks are to be ended, or None.
        committed_step: Newest checkpoint of this attempt.
        last_step: Newest row of this attempt.
        step_s: Seconds of the last steps.
        staging: Saves that not all ranks have finished, by step.
        loaded: Bytes read by each rank that has loaded.
        notes: What rank 0 said about how it loaded.
        done: Outcome of each rank that has ended as it should.
        failures: `{rank, is_death, type, message}`, in the order in which they became known.
    """

    world_size: int
    ranks: dict[int, RankView]
    rendezvous: tuple[str, int] | None = None
    abort: str | None = None
    committed_step: int = 0
    last_step: int = 0
    step_s: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    staging: dict[int, Staging] = field(default_factory=dict)
    loaded: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    done: dict[int, str] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, world_size: int, now: float) -> GroupState:
        """A group whose ranks have not said anything yet."""
        return cls(world_size, {rank: RankView(rank, "start", 0, now) for rank in range(world_size)})

    def seen(self, rank: int, phase: str | None, step: int | None, now: float) -> None:
        """Notes progress of a rank; None leaves what was known."""
        old = self.ranks[rank]
        self.ranks[rank] = RankView(rank, phase or old.phase, old.step if step is None else step, now)

    def outcome(self) -> str | None:
        """Returns how the group ended: completed, stopped, failed; None while it works."""
        if self.failures:
            return "failed"
        if self.world_size and len(self.done) == self.world_size:
            return next(iter(self.done.values()))
        return None
