"""Decisions as pure functions of what is known; carrying them out is the caller's work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ft.checkpoint.manifest import Fingerprint, Manifest
from dist_ft.errors import CheckpointError, UsageError


def check_resume(manifest: Manifest, wanted: Fingerprint) -> None:
    """Refuses to go on from a checkpoint of another model, data, seed, method or global batch.

    Raises:
        UsageError: With both fingerprints.
    """
    if differences := manifest.fingerprint.differences(wanted):
        raise UsageError(
            f"--resume: checkpoint step {manifest.step} belongs to something else; "
            + "; ".join(differences)
            + ". Resume with the config it was made with, or choose another run.name"
        )


def newest_first(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """Yields the checkpoints to try when an attempt starts, best first."""
    yield from sorted(manifests, key=lambda m: (m.step, m.attempt), reverse=True)


def nothing_usable(damages: Sequence[str]) -> CheckpointError:
    """The error when every checkpoint of a run is damaged: starting anew would lose the run silently."""
    return CheckpointError(
        "no checkpoint of this run is whole: " + "; ".join(damages) + ". Restore the files, or choose another run.name"
    )
