"""Staged files → a committed checkpoint: nothing exists for readers before all of it is proved to be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_ft.checkpoint.manifest import MANIFEST, Fingerprint, Manifest, check_coverage, map_slices
from dist_ft.checkpoint.tensorfile import WrittenFile
from dist_ft.errors import CheckpointError
from dist_ft.messages import Staged
from dist_ft.slices import Cursor, ParamInfo
from dist_ft.storage.store import Store


@dataclass
class Staging:
    """What the ranks of one attempt have staged for one step."""

    files: dict[int, WrittenFile] = field(default_factory=dict)
    details: dict[str, Any] | None = None

    def add(self, rank: int, message: Staged) -> None:
        """Takes a rank's report."""
        self.files[rank] = WrittenFile(**message.file)
        if message.details is not None:
            self.details = message.details

    def is_whole(self, world_size: int) -> bool:
        """Whether every rank has reported."""
        return len(self.files) == world_size and self.details is not None


def commit(store: Store, run_id: str, attempt: int, wandb_id: str | None, staging: Staging) -> Manifest:
    """Checks coverage and creates the manifest.

    Raises:
        CheckpointError: Elements are missing or doubled, or a manifest of this name exists.
    """
    details = staging.details
    assert details is not None
    manifest = Manifest(
        run_id=run_id,
        attempt=attempt,
        step=details["step"],
        cursor=Cursor(**details["cursor"]),
        world_size=len(staging.files),
        zero_stage=details["zero_stage"],
        optimizer_step=details["optimizer_step"],
        fingerprint=Fingerprint(**details["fingerprint"]),
        params=tuple(ParamInfo.from_dict(p) for p in details["params"]),
        groups=details["groups"],
        schedule=details["schedule"],
        files=tuple(staging.files[rank] for rank in sorted(staging.files)),
        probe=details["probe"],
        environment=details["environment"],
        wandb_id=wandb_id,
    )
    slices = map_slices(store, manifest.directory, [file.name for file in manifest.files])
    check_coverage(manifest.params, slices)
    if not store.create_exclusive(f"{manifest.directory}/{MANIFEST}", manifest.encode()):
        raise CheckpointError(f"{manifest.directory} has a manifest already; a checkpoint is never replaced")
    return manifest
