"""Which checkpoint an attempt starts from, and which folders go: rules of `checkpoint/` applied to a store."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dist_ft.checkpoint.lineage import committed, read_attempts
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, verify_files
from dist_ft.checkpoint.retention import deletable
from dist_ft.coordinator.recorder import Books
from dist_ft.coordinator.resume_rules import newest_first, nothing_usable
from dist_ft.errors import CheckpointError
from dist_ft.run.scores import Scores
from dist_ft.storage.store import Store

logger = logging.getLogger(__name__)


def newest_whole(
    store: Store, books: Books, can_start: Callable[[Manifest], bool], before: int | None = None
) -> Manifest | None:
    """Returns the newest checkpoint whose files have their hashes; None when the run has no checkpoint.

    Reads all of it, at the speed of the disk. Damaged ones are passed over and noted in the ledger.

    Args:
        store: The run directory.
        books: Gets a note of each damage, and knows what was committed.
        can_start: Whether the run may go on from a checkpoint.
        before: Look at attempts below this number only.

    Raises:
        CheckpointError: There are checkpoints, or were, and none of them is whole.
    """
    unreadable: list[str] = []
    found = committed(store, unreadable, before)
    damages: list[tuple[int | None, str]] = [(None, problem) for problem in unreadable]
    damages += [(None, f"{folder}/{MANIFEST} is missing") for folder in _without_manifest(store, books)]
    whole = None
    for manifest in filter(can_start, newest_first(found)):
        try:
            verify_files(store, manifest)
        except CheckpointError as error:
            damages.append((manifest.step, str(error)))
            continue
        whole = manifest
        break
    for step, damage in damages:
        books.note("checkpoint_damaged", step=step, error=damage)
        logger.error("a checkpoint is passed over: %s", damage)
    if whole is None:
        steps = [attempt.start_step for attempt in read_attempts(store) if attempt.start_step]
        lost = [damage for _, damage in damages]
        lost = lost or [f"the checkpoint of step {step}, from which an attempt started, is gone" for step in steps[-1:]]
        lost = lost or [f"{folder}, which was committed, is gone" for folder in sorted(books.commits())[-1:]]
        lost = lost or [f"{manifest.directory} does not fit the length of this run" for manifest in found[-1:]]
        if lost:
            raise nothing_usable(lost)
    return whole


def still_stands(store: Store, start: Manifest | None, before: int) -> bool:
    """Whether a start, chosen before the attempt number was taken, is still there to be read."""
    if start is None:
        return not committed(store, before=before)
    return f"{start.directory}/{MANIFEST}" in store.names("checkpoints")


def clean_up(store: Store, keep_last: int, attempt: int, scores: Scores | None = None) -> None:
    """Deletes the folders that nobody needs any more. A deletion that fails never disturbs the run.

    Args:
        store: The run directory.
        keep_last: `checkpoint.keep_last`.
        attempt: The current attempt.
        scores: By which the best checkpoint stays besides, if any does.
    """
    unreadable: list[str] = []
    try:
        manifests = committed(store, unreadable)
        best = scores.best(m.step for m in manifests) if scores else None
        folders = deletable(store.folders("checkpoints"), manifests, keep_last, attempt, best)
    except (OSError, CheckpointError) as error:
        unreadable.append(str(error))
    if unreadable:  # what it says might be needed
        logger.warning("old checkpoints stay for now: %s", unreadable[0])
        return
    for folder in folders:
        try:
            store.delete(folder)
        except OSError as error:
            logger.warning("%s stays for now: %s", folder, error)


def _without_manifest(store: Store, books: Books) -> list[str]:
    """Folders that were committed, as the ledger says, and have lost their manifest."""
    names = store.names("checkpoints")
    folders = {name.rsplit("/", 1)[0] for name in names}
    return sorted(folder for folder in folders & books.commits() if f"{folder}/{MANIFEST}" not in names)
