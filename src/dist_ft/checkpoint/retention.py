"""Which checkpoints may go: pure."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ft.checkpoint.manifest import Manifest


def surplus(manifests: Sequence[Manifest], keep_last: int, pinned_steps: Sequence[int] = ()) -> list[Manifest]:
    """Returns the checkpoints beyond the last `keep_last`, oldest first; pinned steps stay."""
    ordered = sorted(manifests, key=lambda m: (m.step, m.attempt))
    return [m for m in ordered[: max(0, len(ordered) - keep_last)] if m.step not in pinned_steps]
