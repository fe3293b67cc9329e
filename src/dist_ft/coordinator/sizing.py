"""Decides how many workers a run has, from what the cluster holds and how the run goes. Pure.

Leaving is at once, growing is slow: a machine that gives notice is left behind the next step, a machine that joins
must stay for a while and must be worth a restart of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dist_ft.config.cluster_sections import ClusterConfig
from dist_ft.coordinator.watchdog import History

_FIRST_GUESS_S = 15.0
"""What a resize costs while none was measured."""


@dataclass(frozen=True)
class ClusterView:
    """What the cluster holds for this run at one moment.

    Attributes:
        fits: Workers that would find room on machines that are to stay, the present ones included.
        leaving: Addresses of machines that hold workers of the group and have given notice.
        formed_at: When the present workers were started; tells groups apart.
    """

    fits: int
    leaving: tuple[str, ...] = ()
    formed_at: float = 0.0


@dataclass(frozen=True)
class Progress:
    """How the run goes.

    Attributes:
        world_size: Present workers.
        steps_left: Steps to the end.
        batch: `train.global_batch_size`.
        resize_s: What the last resize cost, or a guess.
    """

    world_size: int
    steps_left: int
    batch: int
    resize_s: float


def largest_allowed(fits: int, cluster: ClusterConfig) -> int | None:
    """Return the most workers that fit and are allowed; None when that is fewer than the run goes on with."""
    return max((size for size in allowed_sizes(cluster) if size <= fits), default=None)


def allowed_sizes(cluster: ClusterConfig) -> Sequence[int]:
    """Return the worker counts that the run may have."""
    within = range(cluster.min_workers, cluster.max_workers + 1)
    return within if cluster.allowed_sizes is None else [size for size in cluster.allowed_sizes if size in within]


def gain_s(progress: Progress, target: int, history: History) -> float:
    """Return the seconds that the steps which are left would take less on `target` workers.

    By the steps of this run at that size, or else by how many sequences the busiest rank would have; 0 while it is
    not known how long a step takes.
    """
    present = history.median_step_s(progress.world_size)
    if present is None:
        return 0.0
    share = ceil(progress.batch / target) / ceil(progress.batch / progress.world_size)
    there = history.median_step_s(target)
    return progress.steps_left * (present - (present * share if there is None else there))


class Sizing:
    """Decides when to form the group again at another size.

    Attributes:
        resize_s: Seconds from the last interruption to the first step after it, or a guess.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self.resize_s = _FIRST_GUESS_S
        self._cluster = cluster
        self._larger_since: float | None = None
        self._interrupted_at: float | None = None

    def reason_to_drain(self, view: ClusterView, progress: Progress, history: History, now: float) -> str | None:
        """Return why the group at work should checkpoint and be formed anew; None when it should go on.

        Args:
            view: The cluster.
            progress: The run.
            history: Measured steps.
            now: Monotonic time in seconds.
        """
        if view.leaving:
            return f"{', '.join(view.leaving)} will leave the cluster"
        target = largest_allowed(view.fits, self._cluster)
        wait_s = self._cluster.grow_after_s
        if wait_s is None or target is None or target <= progress.world_size:
            self._larger_since = None
            return None
        if self._larger_since is None:
            self._larger_since = now
        if now - self._larger_since < wait_s:
            return None
        gained = gain_s(progress, target, history)
        if self._cluster.grow_if_it_pays and gained <= progress.resize_s:
            return None
        return f"room for {target} workers; saves about {gained:.0f} s, costs about {progress.resize_s:.0f} s"

    def interrupted(self, now: float) -> None:
        """Note that steps have ended: by a failure, or to resize."""
        self._larger_since = None
        self._interrupted_at = self._interrupted_at or now

    def stepped(self, now: float) -> None:
        """Note that a step was made."""
        if self._interrupted_at is not None:
            self.resize_s = now - self._interrupted_at
            self._interrupted_at = None
