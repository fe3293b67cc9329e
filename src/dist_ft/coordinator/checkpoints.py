"""Which checkpoint an attempt starts from, and which folders go: rules of `checkpoint/` applied to a store."""

from __future__ import annotations

import logging

from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import Manifest, verify_files
from dist_ft.checkpoint.retention import deletable
from dist_ft.checkpoint.store import Store
from dist_ft.coordinator.ledger import Ledger
from dist_ft.coordinator.policies import newest_first, nothing_usable
from dist_ft.errors import CheckpointError

logger = logging.getLogger(__name__)


def newest_whole(store: Store, ledger: Ledger) -> Manifest | None:
    """Returns the newest checkpoint whose files have their hashes; None when the run has no checkpoint.

    Reads all of it, at the speed of the disk. Damaged ones are passed over and noted in the ledger.

    Raises:
        CheckpointError: There are checkpoints, and all of them are damaged.
    """
    unreadable: list[str] = []
    found = committed(store, unreadable)
    damages: list[tuple[int | None, str]] = [(None, problem) for problem in unreadable]
    whole = None
    for manifest in newest_first(found):
        try:
            verify_files(store, manifest)
        except CheckpointError as error:
            damages.append((manifest.step, str(error)))
            continue
        whole = manifest
        break
    for step, damage in damages:
        ledger.add("checkpoint_damaged", step=step, error=damage)
        logger.error("a checkpoint is passed over: %s", damage)
    if whole is None and damages:
        raise nothing_usable([damage for _, damage in damages])
    return whole


def clean_up(store: Store, keep_last: int, attempt: int) -> None:
    """Deletes the folders that nobody needs any more. A deletion that fails never disturbs the run."""
    try:
        for folder in deletable(store.folders("checkpoints"), committed(store), keep_last, attempt):
            store.delete(folder)
    except OSError as error:
        logger.warning("old checkpoints stay for now: %s", error)
