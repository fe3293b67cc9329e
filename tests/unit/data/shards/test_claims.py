"""Claims save work; a shard made twice is no harm, one made by nobody is."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dist_ft.data.shards.claims import kept, wait_for_claim
from dist_ft.storage.store import LocalStore

KEY = "abc"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def holder(store: LocalStore) -> dict[str, object]:
    return dict(json.loads(store.read(f"claims/{KEY}/holder.json")))


def test_the_first_gets_the_claim_and_gives_it_up(store: LocalStore) -> None:
    owner = wait_for_claim(store, KEY, lambda: False)
    assert owner is not None
    with kept(store, KEY, owner):
        assert holder(store)["owner"] == owner
    assert store.names("claims") == []


def test_what_is_done_needs_no_claim(store: LocalStore) -> None:
    assert wait_for_claim(store, KEY, lambda: True) is None
    assert store.names("") == []


def test_a_waiter_gets_what_the_holder_has_made(store: LocalStore) -> None:
    first = wait_for_claim(store, KEY, lambda: False)
    assert first is not None
    looks: list[int] = []

    def is_done() -> bool:
        looks.append(1)
        return len(looks) > 3

    assert wait_for_claim(store, KEY, is_done, poll_s=0.001) is None
    assert holder(store)["owner"] == first


def test_an_abandoned_claim_is_taken_over(store: LocalStore) -> None:
    first = wait_for_claim(store, KEY, lambda: False)
    second = wait_for_claim(store, KEY, lambda: False, abandoned_s=0.02, poll_s=0.005)
    assert second not in (None, first)
    assert holder(store)["owner"] == second


def test_a_claim_that_is_kept_alive_is_not_taken_over(store: LocalStore) -> None:
    first = wait_for_claim(store, KEY, lambda: False)
    assert first is not None
    over = threading.Event()
    with kept(store, KEY, first, beat_s=0.01):
        waiter = threading.Thread(
            target=lambda: over.set() if wait_for_claim(store, KEY, over.is_set, 1.0, 0.01) else None, daemon=True
        )
        waiter.start()
        assert not over.wait(1.5)
        beats = holder(store)["beat"]
        assert isinstance(beats, int)
        assert beats > 10
        over.set()
        waiter.join(5)
