"""Decides which checkpoints stay and which folders may be deleted. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from dist_ft.checkpoint.manifest import Manifest

_FOLDER = re.compile(r"step-(\d+)-a(\d+)$")


@dataclass(frozen=True)
class RetentionRules:
    """Which checkpoints of a run stay; see `CheckpointConfig`.

    Attributes:
        keep_last: The newest ones.
        keep_best: The best ones by the metric.
        keep_every: Those whose step is a multiple of it; None for none.
        max_bytes: Most bytes of all together; None for no limit.
    """

    keep_last: int
    keep_best: int = 0
    keep_every: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Retained:
    """What the rules say of a run's checkpoints.

    Attributes:
        reasons: Directory of each checkpoint that stays → why.
        num_bytes: Bytes of all that stay. More than the limit only if even those that never go are larger.
    """

    reasons: dict[str, str]
    num_bytes: int


def retain(
    manifests: Sequence[Manifest], rules: RetentionRules, ranking: Sequence[int], held: Collection[str] = ()
) -> Retained:
    """Choose the checkpoints that stay.

    The newest one, the best one and held ones always stay. The others are taken in the order of their worth while
    they fit into the limit: the last ones, the best ones, then every n-th, each the newer first.

    Args:
        manifests: The checkpoints that count.
        rules: The rules.
        ranking: Measured steps, the best first.
        held: Directories that somebody holds (`holds.py`).
    """
    reasons: dict[str, str] = {}
    num_bytes = 0
    for manifest, reason, is_firm in _by_worth(manifests, rules, ranking, held):
        if manifest.directory in reasons:
            continue
        total = num_bytes + manifest.num_bytes
        if is_firm or rules.max_bytes is None or total <= rules.max_bytes:
            reasons[manifest.directory], num_bytes = reason, total
    return Retained(reasons, num_bytes)


def _by_worth(
    manifests: Sequence[Manifest], rules: RetentionRules, ranking: Sequence[int], held: Collection[str]
) -> Iterator[tuple[Manifest, str, bool]]:
    """Yield what a rule wants to keep, why, and whether it stays whatever the limit is; the worthiest first."""
    newest_first = sorted(manifests, key=lambda m: (m.step, m.attempt), reverse=True)
    of_step = {manifest.step: manifest for manifest in reversed(newest_first)}
    best = [of_step[step] for step in ranking if step in of_step][: rules.keep_best]
    yield from ((manifest, "newest", True) for manifest in newest_first[:1])
    yield from ((manifest, "held", True) for manifest in newest_first if manifest.directory in held)
    yield from ((manifest, "best", True) for manifest in best[:1])
    yield from ((manifest, "last", False) for manifest in newest_first[: rules.keep_last])
    yield from ((manifest, "best", False) for manifest in best)
    if rules.keep_every is not None:
        yield from ((manifest, "every", False) for manifest in newest_first if manifest.step % rules.keep_every == 0)


def deletable(
    folders: Iterable[str],
    manifests: Sequence[Manifest],
    retained: Collection[str],
    attempt: int,
    held: Collection[str] = (),
) -> list[str]:
    """Return the folders below `checkpoints/` that nobody needs any more.

    Checkpoints that no rule keeps; what older attempts left half written, or committed beyond a fork; saves of this
    attempt that failed, which are older than its newest checkpoint; and what a killed deletion left. What this attempt
    or a newer one is writing stays, and so does what is held, and folders of other names.

    Args:
        folders: All of them, as paths in the run directory.
        manifests: The checkpoints that count.
        retained: Directories of those that stay.
        attempt: The current attempt.
        held: Directories that somebody holds, whether they count or not.
    """
    # What a newer attempt wrote is not ours to judge.
    gone = {m.directory for m in manifests if m.attempt <= attempt} - {*retained}
    kept = {m.directory for m in manifests} - gone
    # At most one save is in flight, so this attempt writes nothing older any more.
    finished = max((m.step for m in manifests if m.attempt == attempt), default=0)
    result = []
    for folder in folders:
        name = PurePosixPath(folder).name
        match = _FOLDER.match(name)
        is_over = match is not None and (int(match[2]), int(match[1])) < (attempt, finished)
        if folder in held:
            continue
        if folder in gone or name.startswith(".deleted-") or (is_over and folder not in kept):
            result.append(folder)
    return result
