"""Exports a committed checkpoint as a universal checkpoint of DeepSpeed."""

from __future__ import annotations

from typing import Any

from dist_ft.checkpoint.holds import reading
from dist_ft.checkpoint.manifest import Manifest, verify_files
from dist_ft.checkpoint.universal import write_universal
from dist_ft.config import Config
from dist_ft.run.place import open_run, published


def run(config: Config, run_dir: str, checkpoint: str, to: str) -> dict[str, Any]:
    """Export a checkpoint. The directory appears under its name when it is whole.

    Args:
        config: Config of the run.
        run_dir: Path or URL of the run.
        checkpoint: Manifest path relative to the run.
        to: Target directory, which must not exist.

    Returns:
        `step` of the checkpoint, and `num_groups` of its optimizer.

    Raises:
        CheckpointError: The checkpoint is damaged.
        UsageError: Its optimizer is not AdamW.
    """
    place = open_run(run_dir)
    manifest = Manifest.decode(place.store.read(checkpoint))
    with reading(place.store, manifest.directory), published(to) as directory:
        verify_files(place.store, manifest)
        write_universal(place.store, manifest, directory)
    return {"step": manifest.step, "num_groups": len(manifest.groups)}
