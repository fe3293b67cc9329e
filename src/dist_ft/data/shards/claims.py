"""Claims the work on a shard, so that two runs do not make the same shard twice.

A claim only saves work: a shard is the same whoever makes it, and is published whole. A claim may therefore be wrong
for a moment (two processes take over the same abandoned claim) without harm.

No clocks are compared. A holder changes its claim every few seconds; a process that waits takes the claim over when it
has seen no change for a while by its own clock.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from dist_ft.storage.store import Store

BEAT_S = 5.0
"""Seconds between two signs of life of a holder."""
ABANDONED_S = 30.0
"""A claim that has not changed for this time is abandoned."""
_POLL_S = 0.5


def wait_for_claim(
    store: Store, key: str, is_done: Callable[[], bool], abandoned_s: float = ABANDONED_S, poll_s: float = _POLL_S
) -> str | None:
    """Take the claim on a key, waiting for another holder; return the owner's name, or None if the shard is made.

    Args:
        store: Store of the shards.
        key: Key of the shard.
        is_done: Returns whether the shard is made; then no claim is needed.
        abandoned_s: See `ABANDONED_S`.
        poll_s: Seconds between two checks.
    """
    owner, seen, changed_at = uuid.uuid4().hex, b"", time.monotonic()
    while not is_done():
        if store.create_exclusive(_name(key), _content(owner, 0)):
            return owner
        found = b""
        with suppress(FileNotFoundError):
            found = store.read(_name(key))
        if found != seen:
            seen, changed_at = found, time.monotonic()
        elif time.monotonic() - changed_at > abandoned_s:
            store.delete(_folder(key))
            continue
        time.sleep(poll_s)
    return None


@contextmanager
def kept(store: Store, key: str, owner: str, beat_s: float = BEAT_S) -> Iterator[None]:
    """Keep a claim alive inside the block, and give it up afterwards."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(beat_s):
            count += 1
            with suppress(OSError):  # at worst, another process does the same work
                store.put(_name(key), [_content(owner, count)])

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            store.delete(_folder(key))


def _content(owner: str, count: int) -> bytes:
    return json.dumps({"owner": owner, "beat": count}).encode()


def _folder(key: str) -> str:
    return f"claims/{key}"


def _name(key: str) -> str:
    return f"{_folder(key)}/holder.json"
