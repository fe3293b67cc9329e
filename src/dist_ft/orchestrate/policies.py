"""Ray Train's questions, answered by us: how many workers, and what follows a failure.

Both run in Ray Train's controller, a process without torch. What they decide by is pure and tested elsewhere
(`workers_that_fit` here, `coordinator/restarts.py`). The Ray names are pinned by `tests/contracts/test_ray_names.py`.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy

_PROBES_AT_ONCE = 64
_PROBE_LIMIT_S = 2.0
_LONGEST_WAIT_S = 90.0


def workers_that_fit(nodes: Iterable[Mapping[str, float]], resources: Mapping[str, float], most: int) -> int:
    """Returns how many workers the nodes hold, at most `most`; pure.

    Args:
        nodes: Resources of each living node.
        resources: Resources of one worker.
        most: `cluster.max_workers`.
    """
    needed = {name: amount for name, amount in resources.items() if amount > 0}
    if not needed:
        return most
    on_each = (min(int(node.get(name, 0) / amount) for name, amount in needed.items()) for node in nodes)
    return min(most, sum(on_each))


class ElasticPolicy(ScalingPolicy):
    """Forms the group with as many workers as the living nodes hold, within `cluster.num_workers`."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, fewest: int, most: int) -> None:
        super().__init__(scaling_config)
        self._fewest = fewest
        self._most = most
        self._silent_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See the base class; waits while there are fewer than `fewest`."""
        self._maybe_send_resource_request()
        resources = self.scaling_config._resources_per_worker_not_none
        nodes = [node for node in ray.nodes() if node["Alive"]]
        count = workers_that_fit((node["Resources"] for node in nodes), resources, self._most)
        if count < self._fewest or self._awaits_the_end_of_a_node(nodes):
            return NoopDecision()
        self._silent_since = None
        return ResizeDecision(num_workers=count, resources_per_worker=resources)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """See the base class; a group at work is left alone."""
        self._maybe_send_resource_request()
        return NoopDecision()

    def _awaits_the_end_of_a_node(self, nodes: Sequence[dict[str, Any]]) -> bool:
        """Whether Ray still counts a node whose raylet does not answer.

        Ray declares it dead after 10 to 60 s. A group formed before would wait for it, for a minute in vain.
        """
        if len(answering(nodes)) == len(nodes):
            return False
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        return now - self._silent_since < _LONGEST_WAIT_S  # a firewall may be all that is wrong

    def _get_num_workers_for_resource_request(self) -> int:
        return self._most


def answering(nodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns those of `ray.nodes()` whose raylet accepts connections."""
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        return [node for node, is_there in zip(nodes, pool.map(_answers, nodes), strict=True) if is_there]


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_LIMIT_S).close()
    except OSError:
        return False
    return True


class AskCoordinator(FailurePolicy):
    """Lets the coordinator decide, which knows what the ranks said."""

    def __init__(self, failure_config: ray.train.FailureConfig, coordinator: str, namespace: str) -> None:
        super().__init__(failure_config)
        self._where = (coordinator, namespace)

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """See the base class."""
        message = str(training_failed_error).strip().splitlines()
        actor = ray.get_actor(*self._where)
        decision = ray.get(actor.decide.remote(message[-1] if message else type(training_failed_error).__name__))
        return FailureDecision.RETRY if decision["is_restart"] else FailureDecision.RAISE
