"""How many workers the nodes hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.orchestrate.workers.nodes import Node
from dist_ft.orchestrate.workers.scaling import workers_that_fit

GPU = {"GPU": 1.0, "CPU": 4.0}


def _node(total: dict[str, float], free: dict[str, float] | None = None, name: str = "a") -> Node:
    return Node(name, "10.0.0.1", 1, total, total if free is None else free, is_leaving=False)


@pytest.mark.parametrize(
    ("nodes", "resources", "count"),
    [
        ([], {"CPU": 1.0}, 0),
        ([{"CPU": 4.0}], {"CPU": 1.0}, 4),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 2),  # what is left of two nodes makes no worker
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 8.0}], GPU, 2),
        ([{"CPU": 64.0, "GPU": 1.0}, {"CPU": 64.0}], GPU, 1),
        ([{"CPU": 4.0}], {"CPU": 0.0}, None),
        ([{"GPU": 1.0, "CPU": 1.0}], {"GPU": 0.5}, 2),
    ],
)
def test_workers_are_counted_node_by_node(
    nodes: list[dict[str, float]], resources: dict[str, float], count: int | None
) -> None:
    assert workers_that_fit([_node(total) for total in nodes], {}, resources) == count


@pytest.mark.parametrize(
    ("free", "own", "count"),
    [
        (2.0, 0, 2),  # another job has the rest
        (2.0, 2, 4),  # the rest is ours
        (4.0, 2, 4),  # ours have died and have given back their room already
        (0.0, 3, 3),
        (1.9999999, 0, 2),  # what Ray leaves after giving and taking back
    ],
)
def test_the_room_is_what_is_free_and_what_is_ours(free: float, own: int, count: int) -> None:
    assert workers_that_fit([_node({"CPU": 4.0}, {"CPU": free})], {"a": own}, {"CPU": 1.0}) == count


@given(st.lists(st.integers(0, 16), max_size=6), st.integers(1, 4))
def test_another_node_never_takes_a_worker_away(cpus: list[int], each: int) -> None:
    nodes = [_node({"CPU": float(count)}, name=str(i)) for i, count in enumerate(cpus)]
    counts = [workers_that_fit(nodes[:n], {}, {"CPU": float(each)}) or 0 for n in range(len(cpus) + 1)]
    assert counts == sorted(counts)
