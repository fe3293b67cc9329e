"""Decides how many workers a run has, from the state of the cluster and of the run. Pure.

Shrinking is immediate, growing is slow: the group leaves a machine that gives notice after the next step, but a new
machine must stay for a while and be worth a restart of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dist_ft.config.cluster_sections import ClusterConfig
from dist_ft.coordinator.watchdog import History

_FIRST_GUESS_S = 15.0
"""Assumed cost of a resize until one is measured."""


@dataclass(frozen=True)
class ClusterView:
    """Describes the cluster at one moment, as this run sees it.

    Attributes:
        fits: Workers that fit on the machines that will stay, including the present workers.
        leaving: Addresses of machines that hold workers of the group and have given notice.
        formed_at: When the present workers were started; distinguishes groups.
    """

    fits: int
    leaving: tuple[str, ...] = ()
    formed_at: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Describes the progress of the run.

    Attributes:
        world_size: Present workers.
        steps_left: Steps to the end.
        batch: `train.global_batch_size`.
        resize_s: Seconds that the last resize cost, or a guess.
    """

    world_size: int
    steps_left: int
    batch: int
    resize_s: float


def largest_allowed(fits: int, cluster: ClusterConfig) -> int | None:
    """Return the largest allowed number of workers that fit; None if fewer fit than the run needs."""
    return max((size for size in allowed_sizes(cluster) if size <= fits), default=None)


def allowed_sizes(cluster: ClusterConfig) -> Sequence[int]:
    """Return the worker counts that the run may have."""
    within = range(cluster.min_workers, cluster.max_workers + 1)
    return within if cluster.allowed_sizes is None else [size for size in cluster.allowed_sizes if size in within]


def gain_s(progress: Progress, target: int, history: History) -> float:
    """Return the seconds that `target` workers would save over the remaining steps.

    The estimate uses steps of this run at that size, or else the number of sequences of the busiest rank. It is 0 while
    the duration of a step is unknown.
    """
    present = history.median_step_s(progress.world_size)
    if present is None:
        return 0.0
    share = ceil(progress.batch / target) / ceil(progress.batch / progress.world_size)
    there = history.median_step_s(target)
    return progress.steps_left * (present - (present * share if there is None else there))


class Sizing:
    """Decides when to form a new group at another size.

    Attributes:
        resize_s: Seconds from the last interruption to the first step after it, or a guess.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        self.resize_s = _FIRST_GUESS_S
        self._cluster = cluster
        self._larger_since: float | None = None
        self._interrupted_at: float | None = None

    def reason_to_drain(self, view: ClusterView, progress: Progress, history: History, now: float) -> str | None:
        """Return why the group should checkpoint and end, so that a new one is formed; None if it should continue.

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
        """Record that the steps were interrupted, by a failure or to resize."""
        self._larger_since = None
        self._interrupted_at = self._interrupted_at or now

    def stepped(self, now: float) -> None:
        """Record that a step was completed."""
        if self._interrupted_at is not None:
            self.resize_s = now - self._interrupted_at
            self._interrupted_at = None
