"""Attempts, and the rule that says which checkpoints count.

A driver takes an attempt number by creating `attempts/0003.json` exclusively; the file names the checkpoint it
starts from. Readers follow that chain backwards: what an older attempt committed beyond the point where a
newer one forked off does not count, so a zombie can write only what nobody reads.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from dist_ft.checkpoint.manifest import Manifest, read_manifests
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.layout import FORMAT_VERSION
from dist_ft.storage.store import Store


@dataclass(frozen=True)
class Attempt:
    """One formation of the worker group.

    Attributes:
        number: Counted from 1, never reused.
        start_step: Step of the checkpoint it starts from; 0 starts anew.
        start_attempt: The attempt that wrote that checkpoint; 0 when it starts anew.
        started_at: Unix time in seconds.
    """

    number: int
    start_step: int
    start_attempt: int
    started_at: float


def take_attempt(store: Store, start: Manifest | None, after: int | None = None) -> Attempt:
    """Take the next attempt number, starting from a checkpoint.

    Args:
        store: The run directory.
        start: The checkpoint; None starts anew.
        after: The attempt that this driver has; a driver without one goes on after whichever is the newest.

    Raises:
        UsageError: Somebody else took it at this moment.
    """
    number = (newest_number(store) if after is None else after) + 1
    attempt = Attempt(number, start.step if start else 0, start.attempt if start else 0, time.time())
    data = json.dumps({"format_version": FORMAT_VERSION, **asdict(attempt)}).encode()
    if not store.create_exclusive(f"attempts/{number:04d}.json", data):
        raise UsageError(f"another driver has just taken attempt {number} of this run; wait for it or stop it")
    return attempt


def newest_number(store: Store) -> int:
    """Return the highest attempt number taken; 0 before the first. Costs one listing."""
    names = (PurePosixPath(name).stem for name in store.names("attempts"))
    return max((int(stem) for stem in names if stem.isdigit()), default=0)


def read_attempts(store: Store) -> list[Attempt]:
    """Return the attempts of a run, oldest first.

    Raises:
        CheckpointError: An attempt file cannot be read; which checkpoints count would be a guess.
    """
    attempts = []
    for name in store.names("attempts"):
        if not PurePosixPath(name).stem.isdigit():
            continue
        try:
            raw = json.loads(store.read(name))
            if raw.pop("format_version") != FORMAT_VERSION:
                raise CheckpointError(f"{name} is not of format {FORMAT_VERSION}; use the dist-ft that wrote it")
            attempts.append(Attempt(**raw))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{name} is not an attempt file: {error}") from error
    return sorted(attempts, key=lambda attempt: attempt.number)


def committed(store: Store, problems: list[str] | None = None, before: int | None = None) -> list[Manifest]:
    """Return the checkpoints of a run that count, oldest first.

    Args:
        store: The run directory.
        problems: As in `read_manifests`.
        before: Apply the rule as if attempts from this number on did not exist.
    """
    attempts = [attempt for attempt in read_attempts(store) if before is None or attempt.number < before]
    return follow(attempts, read_manifests(store, problems))


def follow(attempts: Sequence[Attempt], manifests: Iterable[Manifest]) -> list[Manifest]:
    """Apply the lineage rule; pure.

    Walking back from the newest attempt, each one's checkpoints count up to the step at which its
    successor forked off.
    """
    by_attempt: dict[int, list[Manifest]] = {}
    for manifest in manifests:
        by_attempt.setdefault(manifest.attempt, []).append(manifest)
    known = {attempt.number: attempt for attempt in attempts}
    result: list[Manifest] = []
    current = attempts[-1] if attempts else None
    limit: int | None = None
    while current is not None:
        if current.start_attempt >= current.number:
            raise CheckpointError(f"attempt {current.number} names attempt {current.start_attempt} as its start")
        result += [m for m in by_attempt.get(current.number, []) if limit is None or m.step <= limit]
        limit = current.start_step if limit is None else min(limit, current.start_step)
        current = known.get(current.start_attempt)
    return sorted(result, key=lambda manifest: (manifest.step, manifest.attempt))
