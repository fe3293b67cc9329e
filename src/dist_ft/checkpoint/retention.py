"""Decides which checkpoint folders may be deleted. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from dist_ft.checkpoint.manifest import Manifest

_FOLDER = re.compile(r"step-\d+-a(\d+)$")


def surplus(manifests: Sequence[Manifest], keep_last: int, best: int | None = None) -> list[Manifest]:
    """Return the checkpoints beyond the last `keep_last`, oldest first, except that of step `best`."""
    ordered = sorted(manifests, key=lambda m: (m.step, m.attempt))
    return [m for m in ordered[: max(0, len(ordered) - keep_last)] if m.step != best]


def deletable(
    folders: Iterable[str], manifests: Sequence[Manifest], keep_last: int, attempt: int, best: int | None = None
) -> list[str]:
    """Return the folders below `checkpoints/` that nobody needs any more.

    Surplus checkpoints; what older attempts left half written, or committed beyond a fork; and what a killed
    deletion left. What this attempt or a newer one is writing stays, and so do folders of other names.

    Args:
        folders: All of them, as paths in the run directory.
        manifests: The checkpoints that count.
        keep_last: How many of those stay.
        attempt: The current attempt.
        best: Step that stays besides, if any.
    """
    # What a newer attempt wrote is not ours to judge.
    gone = {m.directory for m in surplus(manifests, keep_last, best) if m.attempt <= attempt}
    kept = {m.directory for m in manifests} - gone
    result = []
    for folder in folders:
        name = PurePosixPath(folder).name
        match = _FOLDER.match(name)
        is_older = match is not None and int(match[1]) < attempt
        if folder in gone or name.startswith(".deleted-") or (is_older and folder not in kept):
            result.append(folder)
    return result
