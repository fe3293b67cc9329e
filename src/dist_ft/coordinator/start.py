"""Chooses the checkpoint that an attempt starts from, by the rules of `checkpoint/`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from dist_ft.checkpoint.lineage import committed, read_attempts
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, verify_files
from dist_ft.coordinator.recorder import Recorder
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.printable import format_bytes
from dist_ft.run.events import CheckpointDamaged
from dist_ft.slices import Fingerprint
from dist_ft.storage.store import Store

logger = logging.getLogger(__name__)


def check_resume(manifest: Manifest, wanted: Fingerprint) -> None:
    """Refuse to resume from a checkpoint of another model, data, seed, method, objective or global batch.

    Raises:
        UsageError: The fingerprints differ; the message has both.
    """
    if differences := manifest.fingerprint.differences(wanted):
        raise UsageError(
            f"--resume: checkpoint step {manifest.step} belongs to something else; "
            + "; ".join(differences)
            + ". Resume with the config it was made with, or choose another run.name"
        )


def can_go_on(manifest: Manifest, global_batch_size: int, max_steps: int, num_positions: int) -> bool:
    """Return whether a run of this length may start from a checkpoint, because it would pass through the same state.

    The last step of a run takes the remaining sequences, which may be less than a global batch. A longer run takes a
    whole batch there; if it started after the short step, it would skip sequences.
    """
    here = min(manifest.step * global_batch_size, num_positions)
    return manifest.step <= max_steps and manifest.cursor.position == here


def check_length(manifests: Sequence[Manifest], global_batch_size: int, max_steps: int, num_positions: int) -> None:
    """Refuse a resume if a run of this length can start from no checkpoint.

    Raises:
        UsageError: No checkpoint fits; the message has both lengths and what to do.
    """
    if manifests and not any(can_go_on(m, global_batch_size, max_steps, num_positions) for m in manifests):
        last = manifests[-1]
        raise UsageError(
            f"--resume: with this train.max_steps and train.epochs the run has {max_steps} steps and {num_positions} "
            f"sequences; its checkpoints (the last: step {last.step} after {last.cursor.position} sequences, "
            f"{global_batch_size} a step) do not lie on that way. Resume with the old length, or choose another "
            "run.name"
        )


class StartSearch:
    """Searches for the newest checkpoint whose files match their hashes.

    The search reads a whole checkpoint at the speed of the disk, which may take an hour. `run` may therefore be called
    on a separate thread: it reads the store and changes nothing. Only the coordinator calls the other methods.

    Args:
        store: The run directory.
        can_start: Returns whether the run may start from a checkpoint.
        commits: Folders of all checkpoints that are committed according to the ledger.
        before: Search only attempts below this number.
    """

    def __init__(
        self, store: Store, can_start: Callable[[Manifest], bool], commits: set[str], before: int | None = None
    ) -> None:
        self.before = before
        self._store = store
        self._can_start = can_start
        self._commits = commits
        self._damages: list[tuple[int | None, str]] = []
        self._start: Manifest | None = None
        self._error: Exception | None = None
        self._is_done = threading.Event()
        self._reading: Manifest | None = None
        self._num_bytes = 0

    @property
    def is_done(self) -> bool:
        """Whether the search has ended, so that `result` may be called."""
        return self._is_done.is_set()

    @property
    def progress(self) -> str | None:
        """The checkpoint that is being read, and how much of it was read, in words; None before and after."""
        manifest = None if self.is_done else self._reading
        if manifest is None:
            return None
        read = f"{format_bytes(self._num_bytes)} of {format_bytes(manifest.num_bytes)}"
        return f"checking the checkpoint of step {manifest.step}, {read} read"

    def run(self) -> None:
        """Search for the checkpoint. `result` raises an error of the search, because this may run on another thread."""
        try:
            self._search()
        except Exception as error:  # `result` raises it
            self._error = error
        finally:
            self._is_done.set()

    def result(self, recorder: Recorder) -> Manifest | None:
        """Return the checkpoint; None if the run has none. Writes damaged checkpoints to the ledger.

        Raises:
            CheckpointError: The run has or had checkpoints, and none of them is whole.
        """
        for step, damage in self._damages:
            recorder.note(CheckpointDamaged(step, damage))
            logger.error("a checkpoint is passed over: %s", damage)
        if self._error is not None:
            raise self._error
        return self._start

    def _search(self) -> None:
        unreadable: list[str] = []
        found = committed(self._store, unreadable, self.before)
        self._damages += [(None, problem) for problem in unreadable]
        names = self._store.names("checkpoints")
        folders = {name.rsplit("/", 1)[0] for name in names}
        headless = sorted(f for f in folders & self._commits if f"{f}/{MANIFEST}" not in names)
        self._damages += [(None, f"{folder}/{MANIFEST} is missing") for folder in headless]
        for manifest in filter(self._can_start, reversed(found)):
            self._reading, self._num_bytes = manifest, 0
            try:
                verify_files(self._store, manifest, self._count)
            except CheckpointError as error:
                self._damages.append((manifest.step, str(error)))
                continue
            self._start = manifest
            return
        steps = [attempt.start_step for attempt in read_attempts(self._store) if attempt.start_step]
        lost = [damage for _, damage in self._damages]
        lost = lost or [f"the checkpoint of step {step}, from which an attempt started, is gone" for step in steps[-1:]]
        lost = lost or [f"{folder}, which was committed, is gone" for folder in sorted(self._commits)[-1:]]
        lost = lost or [f"{manifest.directory} does not fit the length of this run" for manifest in found[-1:]]
        if lost:
            # Starting from step 0 would silently lose the run.
            raise CheckpointError(
                f"no checkpoint of this run is whole: {'; '.join(lost)}. Restore the files, or choose another run.name"
            )

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes


def still_stands(store: Store, start: Manifest | None, before: int) -> bool:
    """Return whether a start that was chosen before taking the attempt number is still valid."""
    if start is None:
        return not committed(store, before=before)
    return f"{start.directory}/{MANIFEST}" in store.names("checkpoints")
