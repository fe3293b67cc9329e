"""Deletes the checkpoint folders that `retention.py` lets go, safely against whoever begins to read one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath

from dist_ft.checkpoint.holds import DOOMED, HOLDS, read_holds
from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.retention import Retained, RetentionRules, deletable, retain
from dist_ft.errors import CheckpointError
from dist_ft.storage.store import Store

logger = logging.getLogger(__name__)


def clean_up(store: Store, rules: RetentionRules, attempt: int, ranking: Sequence[int] = ()) -> Retained | None:
    """Delete the folders that are not needed any more. A failed deletion never disturbs the run.

    Only the coordinator calls it. Killed at any moment it leaves checkpoints that are whole, and folders that the next
    call deletes.

    Args:
        store: The run directory.
        rules: Which checkpoints stay.
        attempt: The current attempt.
        ranking: Measured steps, the best first.

    Returns:
        What stays; None if that cannot be known now, so that all of it stays.
    """
    unreadable: list[str] = []
    try:
        manifests = committed(store, unreadable)
        held = {hold.directory for hold in read_holds(store).values()}
        retained = retain(manifests, rules, ranking, held)
        folders = deletable(store.folders("checkpoints"), manifests, retained.reasons, attempt, held)
        if not unreadable:
            _delete(store, folders)
            _forget_ended(store)
    except (OSError, CheckpointError) as error:
        unreadable.append(str(error))
    if unreadable:  # an unreadable manifest might name files that are needed
        logger.warning("old checkpoints stay for now: %s", unreadable[0])
        return None
    return retained


def _delete(store: Store, folders: Sequence[str]) -> None:
    """Mark folders, look for holds that were taken meanwhile, and delete the others."""
    stale = {name.rpartition("/")[0] for name in store.names("checkpoints") if PurePosixPath(name).name == DOOMED}
    for folder in stale - {*folders}:  # a deleter was killed, and now it stays after all
        store.delete(f"{folder}/{DOOMED}")
    marked = [folder for folder in folders if not PurePosixPath(folder).name.startswith(".")]
    for folder in marked:
        store.put(f"{folder}/{DOOMED}", [b""])
    held = {hold.directory for hold in read_holds(store).values()} if marked else set()
    for folder in folders:
        try:
            store.delete(f"{folder}/{DOOMED}" if folder in held else folder)
        except OSError as error:
            logger.warning("%s stays for now: %s", folder, error)


def _forget_ended(store: Store) -> None:
    """Delete the holds of readers that died."""
    names = store.names(HOLDS)  # first, or a hold that is taken meanwhile would seem to have ended
    alive = read_holds(store) if names else {}
    for name in names:
        if PurePosixPath(name).stem not in alive:
            store.delete(name)
