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


def can_go_on(manifest: Manifest, global_batch_size: int, max_steps: int, num_positions: int) -> bool:
    """Whether a run of this length may start from a checkpoint: the run itself would pass through it.

    The last step of a run takes what is left, which may be less than a global batch. A longer run takes a whole
    one there; started behind the short step it would leave sequences out.
    """
    here = min(manifest.step * global_batch_size, num_positions)
    return manifest.step <= max_steps and manifest.cursor.position == here


def check_length(manifests: Sequence[Manifest], global_batch_size: int, max_steps: int, num_positions: int) -> None:
    """Refuses a resume when no checkpoint lies on the way of a run of this length.

    Raises:
        UsageError: With both lengths and the way out.
    """
    if manifests and not any(can_go_on(m, global_batch_size, max_steps, num_positions) for m in manifests):
        last = manifests[-1]
        raise UsageError(
            f"--resume: with this train.max_steps and train.epochs the run has {max_steps} steps and {num_positions} "
            f"sequences; its checkpoints (the last: step {last.step} after {last.cursor.position} sequences, "
            f"{global_batch_size} a step) do not lie on that way. Resume with the old length, or choose another "
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
