"""Who looks at whom: everybody at everybody, and in a large cluster each at as many as look at it."""

from __future__ import annotations

from collections import Counter

import pytest

from dist_ft.orchestrate.health.ask_nodes import _others as others
from dist_ft.orchestrate.health.ask_nodes import members


def nodes(count: int, same_address: bool = False) -> list[dict[str, object]]:
    common = {"Alive": True, "NodeManagerPort": 1, "Resources": {}}
    addresses = ["10.0.0.1" if same_address else f"10.0.0.{index}" for index in range(count)]
    return [
        common | {"NodeID": f"{index:06d}", "NodeManagerAddress": address, "NodeManagerHostname": f"host{index}"}
        for index, address in enumerate(addresses)
    ]


@pytest.mark.parametrize(("count", "each"), [(1, 0), (2, 1), (65, 64), (200, 64)])
def test_each_node_looks_at_as_many_as_look_at_it(count: int, each: int) -> None:
    group = members(nodes(count), "000000")
    seen = Counter(ref.label for member in group for ref in others(member, group))
    assert all(seen[member.ref.label] == each for member in group)
    assert all(member.ref not in others(member, group) for member in group)
    assert [member.is_here for member in group] == [True] + [False] * (count - 1)


def test_nodes_at_one_address_have_names_of_their_own_and_the_dead_are_left_out() -> None:
    group = members([*nodes(2, same_address=True), {"Alive": False, "NodeID": "dead"}], "x")
    assert [member.ref.label for member in group] == ["10.0.0.1/000000", "10.0.0.1/000001"]
