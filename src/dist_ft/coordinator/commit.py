"""Turns staged files into a committed checkpoint, once all of it is proved to be there."""

from __future__ import annotations

from dataclasses import dataclass, field

from dist_ft.checkpoint.manifest import MANIFEST, Manifest, check_coverage, index_pieces, map_slices
from dist_ft.errors import CheckpointError
from dist_ft.layout import checkpoint_name
from dist_ft.messages import Staged
from dist_ft.slices import SavedState, WrittenFile
from dist_ft.storage.store import Store


@dataclass
class Staging:
    """What the ranks of one attempt have staged for one step."""

    files: dict[int, WrittenFile] = field(default_factory=dict)
    state: SavedState | None = None

    def add(self, rank: int, message: Staged) -> None:
        """Takes a rank's report."""
        self.files[rank] = message.file
        if message.state is not None:
            self.state = message.state

    def is_whole(self, world_size: int) -> bool:
        """Whether every rank has reported."""
        return len(self.files) == world_size and self.state is not None


def commit(store: Store, run_id: str, attempt: int, wandb_id: str | None, staging: Staging) -> Manifest:
    """Checks coverage and creates the manifest.

    Raises:
        CheckpointError: Elements are missing or doubled, or a manifest of this name exists.
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
