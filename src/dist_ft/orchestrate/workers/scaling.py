"""Implements Ray Train's policies: the number of workers, and the reaction to a failure.

Both policies run in Ray Train's controller, a process without torch. Their rules are pure: `workers_that_fit` here,
`coordinator/sizing.py` and `coordinator/failures.py`. `tests/contracts/test_ray_names.py` pins the Ray names.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2.api.exceptions import ControllerError

from dist_ft.config.cluster_sections import ClusterConfig
from dist_ft.coordinator.failures import Decision
from dist_ft.coordinator.sizing import ClusterView, largest_allowed
from dist_ft.errors import DistFtError
from dist_ft.machine import workers_on
from dist_ft.messages import CoordinatorAddress
from dist_ft.orchestrate.workers.nodes import Node, answering, list_nodes
from dist_ft.run.events import GroupNotStarted

logger = logging.getLogger(__name__)

_LIST_NODES_EVERY_S = 1.0
_ANSWER_LIMIT_S = 5.0
_DECISION_LIMIT_S = 120.0
"""Longest wait for a decision while the coordinator is being restarted."""


def workers_that_fit(nodes: Sequence[Node], own: Mapping[str, int], resources: Mapping[str, float]) -> int | None:
    """Return how many workers fit on the nodes, in free resources and in place of the run's own workers. Pure.

    Args:
        nodes: Nodes to look at.
        own: Workers of the run by node id.
        resources: Resources of one worker.

    Returns:
        The number; None if a worker needs no resources, so that any number fits.
    """
    count = 0
    for node in nodes:
        room, free = workers_on(node.total, resources), workers_on(node.free, resources)
        if room is None or free is None:
            return None
        # Own workers that died may have freed their resources already, so never count more than the node has in all.
        count += min(room, own.get(node.node_id, 0) + free)
    return count


def find_coordinator(address: CoordinatorAddress) -> Callable[..., Any]:
    """Return a function that calls the coordinator: `ask("decide", …)` returns a reference to the answer.

    Raises:
        ValueError: The actor does not exist, or not at this moment.
    """
    return partial(ray.get_actor(address.name, address.namespace).ask.remote, address.secret)


class ElasticPolicy(ScalingPolicy):
    """Forms the group with as many workers as fit, within `cluster.num_workers`.

    Args:
        scaling_config: Scaling config of Ray Train.
        cluster: The section of the run config.
        coordinator: Address of the coordinator.
    """

    def __init__(
        self, scaling_config: ray.train.ScalingConfig, cluster: ClusterConfig, coordinator: CoordinatorAddress
    ) -> None:
        super().__init__(scaling_config)
        self._cluster = cluster
        self._coordinator = coordinator
        self._own_workers: Counter[str] = Counter()
        self._addresses: dict[str, str] = {}  # addresses of the nodes that hold, or held, workers of the group
        self._has_answered: set[str] = set()
        self._listed_at = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See the base class; waits while fewer workers fit than the run needs."""
        self._maybe_send_resource_request()
        count = largest_allowed(self._count(self._usable()), self._cluster)
        return NoopDecision() if count is None else self._resize(count)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """See the base class; the coordinator makes the group checkpoint and end before it names a new size."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if now - self._listed_at < _LIST_NODES_EVERY_S:
            return NoopDecision()
        self._listed_at = now
        self._own_workers = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self._addresses = {w.metadata.node_id: w.metadata.node_ip for w in worker_group_state.workers}
        nodes = list_nodes()
        leaving = tuple(sorted(node.address for node in nodes if node.is_leaving and node.node_id in self._own_workers))
        fits = self._count([node for node in nodes if not node.is_leaving])
        view = ClusterView(fits, leaving, worker_group_state.start_time)
        try:
            count = ray.get(find_coordinator(self._coordinator)("choose_size", view), timeout=_ANSWER_LIMIT_S)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:  # busy, or being restarted
            logger.warning("the coordinator does not answer: %s", error)
            return NoopDecision()
        return NoopDecision() if count is None else self._resize(count)

    def on_controller_start_worker_group(self, **kwargs: Any) -> dict[str, str] | None:
        """See the base class; keeps the group off nodes that leave, or that are dead but not declared dead yet.

        Ray takes 10 to 60 s to declare a node dead. A group that is formed on such a node would wait in vain.
        """
        usable = {node.node_id for node in self._usable()}
        avoided = sorted(node.node_id for node in list_nodes() if node.node_id not in usable)
        return {ray._raylet.RAY_NODE_ID_KEY: f"!in({','.join(avoided)})"} if avoided else None

    def lost_nodes(self) -> list[str]:
        """Return the addresses of nodes that have workers of the group and do not answer any more."""
        usable = {node.node_id for node in self._usable(with_leaving=True)}
        return sorted({address for node_id, address in self._addresses.items() if node_id not in usable})

    def _usable(self, with_leaving: bool = False) -> list[Node]:
        """Return the nodes to form a group on. A node that never answered counts, as it may have a firewall."""
        nodes = list_nodes()
        there = {node.node_id for node in answering(nodes)}
        self._has_answered |= there
        silent = self._has_answered - there
        return [node for node in nodes if node.node_id not in silent and (with_leaving or not node.is_leaving)]

    def _count(self, nodes: Sequence[Node]) -> int:
        fits = workers_that_fit(nodes, self._own_workers, self.scaling_config._resources_per_worker_not_none)
        return self._cluster.max_workers if fits is None else fits

    def _resize(self, count: int) -> ResizeDecision:
        resources = self.scaling_config._resources_per_worker_not_none
        return ResizeDecision(num_workers=count, resources_per_worker=resources)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._cluster.max_workers


class AskCoordinator(FailurePolicy):
    """Lets the coordinator decide, because it knows what the ranks reported."""

    def __init__(
        self, failure_config: ray.train.FailureConfig, policy: ElasticPolicy, coordinator: CoordinatorAddress
    ) -> None:
        super().__init__(failure_config)
        self._policy = policy
        self._coordinator = coordinator
        self._noted = ""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """See the base class."""
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, WorkerGroupStartupFailedError | WorkerGroupStartupTimeoutError
        ):
            self._note(_last_line(training_failed_error.controller_failure))
            return FailureDecision.RETRY  # no group has started yet; the driver decides how long to try
        said = _last_line(training_failed_error)
        deadline = time.monotonic() + _DECISION_LIMIT_S
        lost_nodes = self._policy.lost_nodes()
        # Ask until an answer comes: the coordinator itself may have been lost and be restarting.
        while time.monotonic() < deadline:
            with contextlib.suppress(ray.exceptions.RayActorError, ValueError):
                ask = find_coordinator(self._coordinator)
                decision: Decision | None = ray.get(ask("decide", said, lost_nodes))
                if decision is not None:
                    return FailureDecision.RETRY if decision.is_restart else FailureDecision.RAISE
            time.sleep(0.2)
        return FailureDecision.RAISE

    def _note(self, reason: str) -> None:
        """Tell the coordinator once why no group starts, so that the user learns of it."""
        if reason == self._noted:
            return
        self._noted = reason
        with contextlib.suppress(ray.exceptions.RayError, ValueError, TimeoutError, DistFtError):
            event = GroupNotStarted(reason)
            ray.get(find_coordinator(self._coordinator)("add_event", event), timeout=_ANSWER_LIMIT_S)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
