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


def can_go_on(manifest: Manifest, max_steps: int, global_batch_size: int) -> bool:
    """Whether a run of `max_steps` may start from a checkpoint.

    The last step of a run takes what is left, which may be less than a global batch. A longer run takes a whole
    one there; started behind the short step it would leave sequences out.
    """
    return manifest.step >= max_steps or manifest.cursor.position == manifest.step * global_batch_size


def check_longer(manifests: Sequence[Manifest], max_steps: int, global_batch_size: int) -> None:
    """Refuses to go on with a longer run when the checkpoint before its short last step is gone.

    Raises:
        UsageError: With the way out.
    """
    if manifests and not any(can_go_on(manifest, max_steps, global_batch_size) for manifest in manifests):
        raise UsageError(
            f"--resume: the run ended with step {manifests[-1].step}, which took fewer sequences than a global batch. "
            f"A run of {max_steps} steps must start before it, and no earlier checkpoint is kept; choose another "
            "run.name"
        )


def newest_first(manifests: Sequence[Manifest]) -> Iterator[Manifest]:
    """Yields the checkpoints to try when an attempt starts, best first."""
    yield from sorted(manifests, key=lambda m: (m.step, m.attempt), reverse=True)


def nothing_usable(damages: Sequence[str]) -> CheckpointError:
    """The error when every checkpoint of a run is damaged: starting anew would lose the run silently."""
    return CheckpointError(
        "no checkpoint of this run is whole: " + "; ".join(damages) + ". Restore the files, or choose another run.name"
    )
