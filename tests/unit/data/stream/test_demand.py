"""Which shards a streamed run gets to."""

from __future__ import annotations

from dist_ft.data.stream.demand import ShardDemand


def test_a_window_is_needed_until_those_before_it_hold_enough() -> None:
    need = ShardDemand.of(100, None, 1)
    assert need.is_needed(0, 0)
    need.add(0, 0, 60)
    assert need.is_needed(0, 1)
    need.add(0, 1, 41)
    assert need.is_needed(0, 1)
    assert not need.is_needed(0, 2)
    assert not need.is_needed(0, 3)
    assert need.is_needed(0, 1)


def test_each_source_is_asked_for_its_share() -> None:
    need = ShardDemand.of(1000, [3.0, 1.0], 2)
    assert need.wanted == [751, 251]
    need.add(1, 0, 251)
    need.add(0, 0, 251)
    assert not need.is_needed(1, 1)
    assert need.is_needed(0, 1)


def test_what_is_being_made_counts_nothing() -> None:
    need = ShardDemand.of(10, None, 1)
    assert all(need.is_needed(0, window) for window in range(5))
