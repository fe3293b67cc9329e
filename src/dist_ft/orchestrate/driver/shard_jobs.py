"""Makes token shards, and their scores by a frozen model, on all nodes, before training or while it goes on.

The tasks ask Ray for no CPU or GPU, because workers may hold them all while they wait for the data or train on it. This
module decides how many tasks run on a node, and which GPU a task that scores uses.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import ray

from dist_ft.config import Config
from dist_ft.data.stream.demand import ShardDemand
from dist_ft.errors import DistFtError
from dist_ft.jobs.spec import Preparation, ShardJob
from dist_ft.machine import num_cores
from dist_ft.orchestrate.driver.tasks import result_of, submit_to
from dist_ft.orchestrate.workers.nodes import Node, list_nodes
from dist_ft.report.progress import ShardProgress
from dist_ft.run.run_inputs import ShardSize

logger = logging.getLogger(__name__)

_MAX_TRIES = 3
_LIST_NODES_EVERY_S = 2.0
_STREAM_SHARE = 0.5
"""Share of each node's cores that make shards while workers train on the rest."""
_LAST_CHECKPOINT_LIMIT_S = 60.0
"""Longest wait for a last checkpoint: ranks that wait for a shard that failed cannot make one."""


@dataclass(frozen=True)
class _Running:
    node_id: str
    job: ShardJob
    tries: int
    device: int | None


class ShardJobs:
    """Makes shards on the nodes. Call `advance` a few times a second.

    Args:
        config: The run config.
        jobs: The shards, in the order in which the run needs them.
        share: Share of each node's cores to use; each node makes at least one shard at a time. Scoring takes a GPU a
            shard, or all these cores for one.
        on_gpu: Whether the run uses CUDA devices.
        demand: In mode `stream`, which of the shards are needed; None means all.

    Attributes:
        progress: Shards made so far.
        sizes: Sizes of the shards made so far, in the order in which they were made.
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
        self._scores = any(job.score_key for job in jobs)
        self._demand = demand
        self._slots: dict[str, int] = {}
        self._listed_at = float("-inf")
        self.sizes: list[ShardSize] = []
        doing = "scoring" if self._scores else "preparing"
        self.progress = ShardProgress(len(jobs), sum(job.num_bytes for job in jobs), time.monotonic(), doing)

    @property
    def is_done(self) -> bool:
        """Whether every shard is made or not needed."""
        return not self._waiting and not self._running

    def advance(self, starters: Mapping[str, str]) -> None:
        """Collect finished tasks and start as many as fit, without waiting.

        Args:
            starters: Sockets of the fork servers, by node id.

        Raises:
            DistFtError: The error of a task; the other tasks run to their end.
        """
        self._collect()
        if time.monotonic() - self._listed_at > _LIST_NODES_EVERY_S:
            self._listed_at = time.monotonic()
            self._slots = {node.node_id: self._num_slots(node) for node in list_nodes() if not node.is_leaving}
        busy = Counter(running.node_id for running in self._running.values())
        free = [(busy[node], node) for node, slots in self._slots.items() if node in starters and busy[node] < slots]
        heapify(free)  # the least busy node gets the next task
        while free and self._drop_unneeded():
            count, node_id = heappop(free)
            job, tries = self._waiting.popleft()
            device = self._free_device(node_id) if self._scores and self._on_gpu else None
            task = job.task(self._config, self._share)
            reference = submit_to(node_id, task, starters, self._on_gpu, device)
            self._running[reference] = _Running(node_id, job, tries, device)
            if count + 1 < self._slots[node_id]:
                heappush(free, (count + 1, node_id))

    def _num_slots(self, node: Node) -> int:
        """Return the tasks that a node runs at a time."""
        if self._scores:
            return max(1, int(node.total.get("GPU", 0))) if self._on_gpu else 1
        # A Ray that this driver started has more slots than cores.
        return max(1, int((num_cores() if self._is_own_ray else node.total.get("CPU", 1)) * self._share))

    def _free_device(self, node_id: str) -> int:
        """Return the first GPU of a node that no task of ours uses."""
        used = {running.device for running in self._running.values() if running.node_id == node_id}
        return next(device for device in range(len(used) + 1) if device not in used)

    def _drop_unneeded(self) -> bool:
        """Drop the next shards that the run does not reach; return whether a shard is left."""
        while self._waiting and self._demand is not None:
            if self._demand.is_needed(*self._waiting[0][0].window):
                break
            self._waiting.popleft()
        return bool(self._waiting)

    def _collect(self) -> None:
        """Take the results of finished tasks; start again a shard whose task was lost."""
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
                self._listed_at = float("-inf")  # the node may be gone
                continue
            self.progress.add(running.job.num_bytes, info["num_rows"])
            self.sizes.append(ShardSize(running.job.window.source, running.job.place, info["num_sequences"]))
            if self._demand is not None:
                self._demand.add(*running.job.window, info["num_sequences"])


class StreamedData:
    """Makes the shards of a run with `data.preparation=stream` while it trains; does nothing in mode `ahead`.

    Args:
        config: The run config.
        prepared: Answer of the preparation.
        on_gpu: Whether the run uses CUDA devices.
    """

    def __init__(self, config: Config, prepared: Preparation, on_gpu: bool) -> None:
        self._jobs: ShardJobs | None = None
        self._num_told = 0
        self._error: DistFtError | None = None
        self._failed_at = 0.0
        streamed = prepared.to_stream
        if streamed is not None:
            demand = ShardDemand.of(prepared.inputs.num_positions, config.data.weights, len(config.data.train))
            for made in streamed.made:
                demand.add(*made.window, made.num_sequences)
            self._jobs = ShardJobs(config, streamed.jobs, _STREAM_SHARE, on_gpu, demand)

    def advance(self, starters: Mapping[str, str]) -> bool:
        """Continue making shards, without waiting; return whether a shard has failed, so that the run must stop."""
        if self._jobs is None or self._error is not None:
            return False
        try:
            self._jobs.advance(starters)
        except DistFtError as error:
            self._error, self._failed_at = error, time.monotonic()
        return self._error is not None

    def new_sizes(self) -> list[ShardSize]:
        """Return the sizes of the shards that were made since the last call."""
        if self._jobs is None:
            return []
        new = self._jobs.sizes[self._num_told :]
        self._num_told += len(new)
        return new

    def check_patience(self) -> None:
        """Raise the error of a failed shard, if the last checkpoint was not made in time.

        Raises:
            DistFtError: See `check`.
        """
        if time.monotonic() - self._failed_at > _LAST_CHECKPOINT_LIMIT_S:
            self.check()

    def check(self) -> None:
        """Raise the error of a failed shard, if there is one.

        Raises:
            DistFtError: A shard failed; the message has the location of the row or another reason.
        """
        if self._error is not None:
            raise self._error
