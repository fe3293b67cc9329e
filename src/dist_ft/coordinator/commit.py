"""Commits the files that the ranks of an attempt stage, after checking that they are complete."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from dist_ft.checkpoint.cleaning import clean_up
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, check_coverage, index_pieces, map_slices
from dist_ft.checkpoint.retention import RetentionRules
from dist_ft.config import Config
from dist_ft.coordinator.failures import RankFailure
from dist_ft.coordinator.recorder import Recorder
from dist_ft.errors import CheckpointError, StorageError
from dist_ft.layout import checkpoint_name
from dist_ft.messages import Staged
from dist_ft.run import events
from dist_ft.run.scores import best_first
from dist_ft.slices import SavedState, WrittenFile
from dist_ft.storage.store import Store
from dist_ft.storage.urls import shown_url

logger = logging.getLogger(__name__)

_FAILED_SAVES = 3
"""Failed saves in a row after which the run ends, because continuing without a checkpoint would risk too much work."""


@dataclass
class Staging:
    """Holds the files that the ranks of one attempt have staged for one step."""

    files: dict[int, WrittenFile] = field(default_factory=dict)
    state: SavedState | None = None

    def add(self, rank: int, message: Staged) -> None:
        """Add a rank's report."""
        self.files[rank] = message.file
        if message.state is not None:
            self.state = message.state

    def is_whole(self, world_size: int) -> bool:
        """Return whether every rank has reported."""
        return len(self.files) == world_size and self.state is not None


def commit(store: Store, run_id: str, attempt: int, wandb_id: str | None, staging: Staging) -> Manifest:
    """Check coverage and create the manifest.

    Raises:
        CheckpointError: Elements are missing or duplicated, or a manifest of this name exists.
    """
    state = staging.state
    assert state is not None
    files = tuple(staging.files[rank] for rank in sorted(staging.files))
    slices = map_slices(store, f"checkpoints/{checkpoint_name(state.step, attempt)}", [file.name for file in files])
    check_coverage(state.params, slices)
    manifest = Manifest(
        run_id=run_id,
        attempt=attempt,
        world_size=len(files),
        files=files,
        wandb_id=wandb_id,
        pieces=index_pieces(slices, files),
        **vars(state),
    )
    if not store.create_exclusive(f"{manifest.directory}/{MANIFEST}", manifest.encode()):
        raise CheckpointError(f"{manifest.directory} has a manifest already; a checkpoint is never replaced")
    return manifest


class Saves:
    """Manages the saves of one attempt: commits complete saves, counts failed ones, deletes old checkpoints.

    Args:
        config: The run config.
        store: The run directory.
        recorder: The records of the run, opened for this attempt.
        world_size: Number of ranks.
        check_newest: Raises StaleAttemptError when another driver has taken over the run.

    Attributes:
        committed_step: Newest checkpoint of this attempt; 0 before the first.
    """

    def __init__(
        self, config: Config, store: Store, recorder: Recorder, world_size: int, check_newest: Callable[[], None]
    ) -> None:
        self.committed_step = 0
        self._config = config
        self._address = shown_url(config.run.address)
        self._store = store
        self._recorder = recorder
        self._world_size = world_size
        self._check_newest = check_newest
        self._staging: dict[int, Staging] = {}
        self._has_told_over = False
        self._unsaved: list[int] = []  # steps of the latest consecutive saves that failed

    def stage(self, rank: int, message: Staged) -> RankFailure | None:
        """Add a rank's report, and commit when all ranks have reported; return a failure that ends the attempt.

        Raises:
            StaleAttemptError: Another driver has taken over the run.
        """
        if message.step in self._unsaved:
            return None
        staging = self._staging.setdefault(message.step, Staging())
        staging.add(rank, message)
        if not staging.is_whole(self._world_size):
            return None
        del self._staging[message.step]
        self._check_newest()
        record = self._recorder.record
        try:
            self._recorder.look_again()
            self._check_newest()
            self._recorder.send()
            manifest = commit(self._store, record.run_id, record.attempt, record.sink_ids.get("wandb"), staging)
        except CheckpointError as error:
            return RankFailure.of(rank, error)
        except OSError as error:
            return self.fail(message.step, str(error), message.is_last)
        self.committed_step = manifest.step
        self._unsaved.clear()
        self._recorder.note(events.Committed(manifest.step))
        self._clean_up()
        return None

    def fail(self, step: int, reason: str, is_last: bool) -> RankFailure | None:
        """Give up a save on all ranks; return a failure if that ends the attempt."""
        if step in self._unsaved:
            return None
        self._unsaved.append(step)
        self._staging.pop(step, None)
        self._recorder.note(events.SaveFailed(step, reason))
        if not is_last and len(self._unsaved) < _FAILED_SAVES:
            return None
        return RankFailure.of(
            0,
            StorageError(
                f"the checkpoint of step {step} cannot be written to {self._address} ({reason}); make room or mend the "
                "storage, then --resume goes on after the last one"
            ),
        )

    def _clean_up(self) -> None:
        try:
            self._recorder.look_again()
        except OSError as error:
            logger.warning("old checkpoints stay for now: %s", error)
            return
        if not self._recorder.is_mine:
            return
        record, limit = self._recorder.record, self._config.checkpoint.max_bytes
        retained = clean_up(self._store, retention_rules(self._config), record.attempt, self._ranking())
        if retained is None or limit is None or retained.num_bytes <= limit or self._has_told_over:
            return
        self._has_told_over = True  # once an attempt
        self._recorder.note(events.OverBudget(self.committed_step, retained.num_bytes, limit))

    def _ranking(self) -> list[int]:
        max_steps = self._recorder.record.max_steps
        return best_first(self._config.eval, lambda: self._recorder.evaluations(max_steps), max_steps)


def retention_rules(config: Config) -> RetentionRules:
    """Return the rules of a config."""
    wanted = config.checkpoint
    keep_best = wanted.keep_best if config.eval.best_metric is not None else 0
    return RetentionRules(wanted.keep_last, keep_best, wanted.keep_every, wanted.max_bytes)
