"""Claims: who makes a shard, so that two runs do not make the same one twice.

A claim saves work and nothing else: a shard is the same whoever makes it, and is published whole. So a claim may be
wrong for a moment (two processes that take over the same abandoned one) without harm.

No clocks are compared. A holder changes its claim every few seconds; whoever waits takes it over once it has seen no
change for a while by its own clock.
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
"""A claim that has not changed for so long is nobody's."""
_POLL_S = 0.5


def wait_for_claim(
    store: Store, key: str, is_done: Callable[[], bool], abandoned_s: float = ABANDONED_S, poll_s: float = _POLL_S
) -> str | None:
    """Takes the claim on a key, waiting for another holder; returns its owner's name, or None when all is done.

    Args:
        store: Where the shards are kept.
        key: Of the shard.
        is_done: Whether the shard is there; then no claim is needed.
        abandoned_s: See `ABANDONED_S`.
        poll_s: Seconds between two looks.
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
    """Keeps a claim alive while the work goes on, and gives it up after it."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(beat_s):
            count += 1
            with suppress(OSError):  # the worst that follows is that another one does the same work
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
