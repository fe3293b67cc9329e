"""Lists the nodes of the Ray cluster: their resources, which of them are about to leave, and which answer."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypedDict

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_PROBES_AT_ONCE = 64
_PROBE_LIMIT_S = 2.0


class RayNode(TypedDict):
    """Types the entries of `ray.nodes()` that are used here."""

    NodeID: str
    Alive: bool
    NodeManagerAddress: str
    NodeManagerPort: int
    NodeManagerHostname: str
    Resources: dict[str, float]


@dataclass(frozen=True)
class Node:
    """A node that Ray counts as alive.

    Attributes:
        node_id: Ray's id of the node.
        address: IP address of the node.
        port: Port of its raylet.
        total: Resources of the node.
        free: Resources that are not in use.
        is_leaving: Whether the node has given notice: preemption, eviction, scaling down.
    """

    node_id: str
    address: str
    port: int
    total: Mapping[str, float]
    free: Mapping[str, float]
    is_leaving: bool


def list_nodes() -> list[Node]:
    """Return the nodes that Ray counts as alive."""
    free = ray._private.state.available_resources_per_node()
    leaving = ray._private.state.state.get_draining_nodes()
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            port=node["NodeManagerPort"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            is_leaving=node["NodeID"] in leaving,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def answering(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes whose raylet accepts connections; Ray takes 10 to 60 s to declare a node dead."""
    with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
        are_there = pool.map(lambda node: is_listening(node.address, node.port), nodes)
        return [node for node, is_there in zip(nodes, are_there, strict=True) if is_there]


def is_listening(host: str, port: int) -> bool:
    """Return whether a process accepts connections at an address and port."""
    try:
        socket.create_connection((host, port), _PROBE_LIMIT_S).close()
    except OSError:
        return False
    return True


def on_node(node_id: str) -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that keeps a task or an actor on this node."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
