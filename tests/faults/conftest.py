"""What the fault tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import AddedNode, LoopbackCluster


@pytest.fixture
def two_nodes() -> Iterator[tuple[LoopbackCluster, AddedNode]]:
    """A Ray of two nodes on loopback, and the second one."""
    cluster = LoopbackCluster()
    yield cluster, cluster.add()
    cluster.close()
