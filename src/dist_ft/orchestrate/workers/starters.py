"""Keeps a fork server on every node, so that ranks start in one second instead of ten."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from dist_ft.orchestrate.workers.nodes import answering, list_nodes, on_node
from dist_ft.orchestrate.workers.processes import ForkServer

logger = logging.getLogger(__name__)

_START_LIMIT_S = 120.0
_ASK_EVERY_S = 2.0


@ray.remote(num_cpus=0)
class StarterActor:
    """Keeps a fork server on its node."""

    def __init__(self, on_gpu: bool) -> None:
        self._server = ForkServer(on_gpu)

    def socket_path(self) -> str:
        """Return the socket of this node's fork server; replaces a server that has died."""
        if not self._server.is_alive:
            self._server.restart()
        return self._server.socket_path


class Starters:
    """Keeps a fork server on every node of the cluster; starts one on new nodes and replaces servers that die.

    Args:
        own: The driver's own server, which serves its node.
        on_gpu: Whether ranks use CUDA devices.

    Attributes:
        paths: Node id → socket, for the servers that are known to run.
    """

    def __init__(self, own: ForkServer, on_gpu: bool) -> None:
        self._here = ray.get_runtime_context().get_node_id()
        self._own = own
        self._on_gpu = on_gpu
        self._actors: dict[str, Any] = {}
        self._asked: dict[str, ray.ObjectRef[str]] = {}
        self._asked_at = float("-inf")
        self.paths = {self._here: own.socket_path}

    def start(self) -> None:
        """Start a server on every node and wait for all; a node that is lost meanwhile has none."""
        self._ask()
        deadline = time.monotonic() + _START_LIMIT_S
        while self._asked and time.monotonic() < deadline:
            ray.wait(list(self._asked.values()), timeout=0.2)
            self._collect()

    def refresh(self) -> bool:
        """Replace servers that died and start servers on new nodes, without waiting; return whether `paths` changed."""
        before = dict(self.paths)
        self._collect()
        if time.monotonic() - self._asked_at > _ASK_EVERY_S:
            if not self._own.is_alive:
                logger.warning("the fork server of this node has died and is replaced")
                self._own.restart()
            self.paths[self._here] = self._own.socket_path
            self._ask()
        return self.paths != before

    def release(self) -> None:
        """End the servers of the other nodes."""
        self._actors.clear()
        self._asked.clear()

    def _ask(self) -> None:
        self._asked_at = time.monotonic()
        nodes = {node.node_id for node in answering(list_nodes()) if not node.is_leaving} - {self._here}
        for gone in self._actors.keys() - nodes:
            del self._actors[gone]
            self.paths.pop(gone, None)
            self._asked.pop(gone, None)
        remote_class: Any = StarterActor
        for node in nodes - self._asked.keys():
            if node not in self._actors:
                self._actors[node] = remote_class.options(scheduling_strategy=on_node(node)).remote(self._on_gpu)
            self._asked[node] = self._actors[node].socket_path.remote()

    def _collect(self) -> None:
        for node, reference in list(self._asked.items()):
            if not ray.wait([reference], timeout=0)[0]:
                continue
            del self._asked[node]
            try:
                self.paths[node] = ray.get(reference)
            except ray.exceptions.RayError as error:
                logger.warning("node %s has no fork server, its ranks start slowly: %s", node, error)
                self._actors.pop(node, None)
                self.paths.pop(node, None)
