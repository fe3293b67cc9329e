"""Makes token shards on all nodes of the cluster, a few at a time on each.

The tasks ask Ray for no CPU: workers may hold all of them, waiting for the data or already training on it. How many
run on a node is decided here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import ray

from dist_ft.config import Config
from dist_ft.data.stream.demand import ShardDemand
from dist_ft.errors import DistFtError
from dist_ft.jobs.spec import ShardJob
from dist_ft.machine import num_cores
from dist_ft.orchestrate.driver.tasks import result_of, submit_to
from dist_ft.orchestrate.workers.nodes import list_nodes
from dist_ft.report.progress import ShardProgress

logger = logging.getLogger(__name__)

_MAX_TRIES = 3
_LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class _Running:
    node_id: str
    job: ShardJob
    tries: int


class ShardJobs:
    """Shards that are being made. Call `look` a few times a second.

    Args:
        config: The run config.
        jobs: The shards, in the order in which they are wanted.
        share: Share of each node's cores that is used; one shard at a time at least.
        on_gpu: Whether the run uses CUDA devices.
        demand: In mode `stream`, which of them are needed; None for all.

    Attributes:
        progress: How far it has got.
    """

    def __init__(
        self,
        config: Config,
        jobs: Sequence[ShardJob],
        share: float,
        on_gpu: bool,
        demand: ShardDemand | None = None,
    ) -> None:
        self._config = config.model_dump(mode="json")
        self._is_own_ray = config.cluster.address is None
        self._waiting = deque((job, 1) for job in jobs)
        self._running: dict[Any, _Running] = {}
        self._share = share
        self._on_gpu = on_gpu
        self._demand = demand
        self._slots: dict[str, int] = {}
        self._looked_at = float("-inf")
        self.progress = ShardProgress(len(jobs), sum(job.num_bytes for job in jobs), time.monotonic())

    @property
    def is_done(self) -> bool:
        """Whether every shard is there."""
        return not self._waiting and not self._running

    def look(self, starters: Mapping[str, str]) -> None:
        """Collects what is finished and begins what fits, without waiting.

        Raises:
            DistFtError: What a task raised; the others are left to end.
        """
        self._collect()
        if time.monotonic() - self._looked_at > _LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._slots = {node.node_id: self._num_slots(node.total) for node in list_nodes() if not node.is_leaving}
        busy = Counter(running.node_id for running in self._running.values())
        free = [(busy[node], node) for node, slots in self._slots.items() if node in starters and busy[node] < slots]
        heapify(free)  # one more on every node before a second one on any
        while free and self._next_is_needed():
            count, node_id = heappop(free)
            self._begin(node_id, starters)
            if count + 1 < self._slots[node_id]:
                heappush(free, (count + 1, node_id))

    def _next_is_needed(self) -> bool:
        """Passes over the shards that the run does not get to."""
        while self._waiting and self._demand is not None:
            if self._demand.is_needed(*self._waiting[0][0].window):
                break
            self._waiting.popleft()
        return bool(self._waiting)

    def _begin(self, node_id: str, starters: Mapping[str, str]) -> None:
        job, tries = self._waiting.popleft()
        reference = submit_to(node_id, job.task(self._config), dict(starters), self._on_gpu)
        self._running[reference] = _Running(node_id, job, tries)

    def _collect(self) -> None:
        if not self._running:
            return
        for reference in ray.wait([*self._running], num_returns=len(self._running), timeout=0)[0]:
            running = self._running.pop(reference)
            try:
                info = result_of(reference)
            except DistFtError as error:
                if not error.retryable or running.tries >= _MAX_TRIES:
                    raise
                logger.warning("a shard is begun anew: %s", error)
                self._waiting.appendleft((running.job, running.tries + 1))
                self._looked_at = float("-inf")  # the node may be gone
                continue
            self.progress.add(running.job.num_bytes, info["num_rows"])
            if self._demand is not None:
                self._demand.add(*running.job.window, info["num_sequences"])

    def _num_slots(self, total: Mapping[str, float]) -> int:
        # A Ray of ours has more slots than cores.
        cores = num_cores() if self._is_own_ray else int(total.get("CPU", 1))
        return max(1, int(cores * self._share))


def make_all(jobs: ShardJobs, look_after: Callable[[], Mapping[str, str]], show: Callable[[str], None]) -> None:
    """Makes every shard and waits for it.

    Args:
        jobs: The shards.
        look_after: Called several times a second; returns the sockets of the fork servers, by node; what it raises
            ends the wait.
        show: Takes the line of progress.
    """
    while not jobs.is_done:
        jobs.look(look_after())
        show(jobs.progress.line(time.monotonic()))
        time.sleep(0.1)
