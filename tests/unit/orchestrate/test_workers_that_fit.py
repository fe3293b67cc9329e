"""How many workers the living nodes hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.orchestrate.policies import workers_that_fit

GPU = {"GPU": 1.0, "CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "resources", "most", "count"),
    [
        ([], {"CPU": 1.0}, 8, 0),
        ([{"CPU": 4.0}], {"CPU": 1.0}, 8, 4),
        ([{"CPU": 4.0}], {"CPU": 1.0}, 3, 3),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0}, 8, 2),  # what is left of two nodes makes no worker
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 8.0}], GPU, 8, 2),
        ([{"CPU": 64.0, "GPU": 1.0}, {"CPU": 64.0}], GPU, 8, 1),
        ([{"CPU": 4.0}], {"CPU": 0.0}, 5, 5),
        ([{"GPU": 1.0, "CPU": 1.0}], {"GPU": 0.5}, 8, 2),
    ],
)
def test_workers_are_counted_node_by_node(
    nodes: list[dict[str, float]], resources: dict[str, float], most: int, count: int
) -> None:
    assert workers_that_fit(nodes, resources, most) == count


@given(st.lists(st.integers(0, 16), max_size=6), st.integers(1, 4), st.integers(1, 40))
def test_another_node_never_takes_a_worker_away(cpus: list[int], each: int, most: int) -> None:
    counts = [
        workers_that_fit([{"CPU": float(c)} for c in cpus[:n]], {"CPU": float(each)}, most)
        for n in range(len(cpus) + 1)
    ]
    assert counts == sorted(counts)
    assert max(counts) <= most
