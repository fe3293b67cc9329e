"""Lists, verifies, tags and deletes the checkpoints of a run, from its files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_ft.checkpoint.holds import add_tag, read_holds, read_tags
from dist_ft.checkpoint.lineage import follow, read_attempts
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, check_coverage, map_slices, read_manifests, verify_files
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.printable import format_bytes
from dist_ft.run.place import Run
from dist_ft.run.state import FINAL
from dist_ft.run.status import read_record


@dataclass(frozen=True)
class Entry:
    """One checkpoint on disk.

    Attributes:
        step: Completed steps.
        attempt: The attempt that wrote it.
        world_size: Ranks that wrote it.
        zero_stage: ZeRO stage at which it was written.
        num_bytes: Size of its slice files.
        path: Directory of the checkpoint.
        tags: Names that keep it.
        counts: Whether readers use it; False if its attempt wrote it after a newer attempt forked off.
    """

    step: int
    attempt: int
    world_size: int
    zero_stage: int
    num_bytes: int
    path: str
    tags: tuple[str, ...]
    counts: bool


def list_checkpoints(run: Run) -> tuple[list[Entry], list[str]]:
    """Return the checkpoints of a run, oldest first, and the problems of unreadable ones.

    Raises:
        UsageError: No run exists at that path.
    """
    manifests, counting, problems = _read(run)
    tags = read_tags(run.store)
    entries = [
        Entry(
            manifest.step,
            manifest.attempt,
            manifest.world_size,
            manifest.zero_stage,
            manifest.num_bytes,
            run.address_of(manifest.directory),
            tuple(sorted(tag for tag, directory in tags.items() if directory == manifest.directory)),
            manifest.directory in counting,
        )
        for manifest in sorted(manifests, key=lambda m: (m.step, m.attempt))
    ]
    return entries, problems


def render_checkpoints(entries: Sequence[Entry], problems: Sequence[str]) -> str:
    """Return the list as a table."""
    lines = [f"{'step':>9}  attempt  workers  ZeRO  {'size':>9}  directory"] if entries else ["no checkpoints"]
    for entry in entries:
        tags = f"  [{', '.join(entry.tags)}]" if entry.tags else ""
        mark = "" if entry.counts else "  (superseded: not used)"
        lines.append(
            f"{entry.step:>9}  {entry.attempt:>7}  {entry.world_size:>7}  {entry.zero_stage:>4}  "
            f"{format_bytes(entry.num_bytes):>9}  checkpoints/{Path(entry.path).name}{tags}{mark}"
        )
    return "\n".join([*lines, *(f"unreadable: {problem}" for problem in problems)])


def verify_checkpoints(run: Run, steps: Sequence[int]) -> Iterator[tuple[str, str | None]]:
    """Read every byte of the checkpoints that count, and yield (directory, problem or None).

    Args:
        run: The run.
        steps: Steps to verify; an empty list means all.

    Raises:
        UsageError: The run does not exist, or has no checkpoint of such a step.
    """
    manifests, counting, problems = _read(run)
    for problem in problems:
        name, _, what = problem.partition(": ")
        yield name, what
    store = run.store
    used = [manifest for manifest in manifests if manifest.directory in counting]
    for manifest in _choose(run, used, steps):
        try:
            verify_files(store, manifest)
            slices = map_slices(store, manifest.directory, [file.name for file in manifest.files])
            check_coverage(manifest.params, slices)
        except (CheckpointError, FileNotFoundError) as error:
            if f"{manifest.directory}/{MANIFEST}" in store.names(
                "checkpoints"
            ):  # otherwise the run has deleted it meanwhile
                yield manifest.directory, str(error)
        else:
            yield manifest.directory, None


def tag_checkpoint(run: Run, tag: str, step: int | None) -> str:
    """Give a checkpoint a name, by which it stays, and return its directory.

    Args:
        run: The run.
        tag: The name.
        step: Step of a checkpoint that counts; None means the newest.

    Raises:
        UsageError: The run or checkpoint does not exist, or the name cannot be given.
    """
    record = read_record(run)
    manifests, counting, _ = _read(run)
    used = [manifest for manifest in manifests if manifest.directory in counting]
    chosen = _choose(run, used, [] if step is None else [step])
    if not chosen:
        raise UsageError(f"run {run} has no committed checkpoint; let it reach its first one")
    directory = max(chosen, key=lambda m: (m.step, m.attempt)).directory
    add_tag(run.store, tag, directory, record.state in FINAL)
    return directory


def remove_checkpoints(run: Run, steps: Sequence[int], force: bool) -> list[str]:
    """Delete checkpoints and return their directories.

    Args:
        run: The run.
        steps: Steps whose checkpoints are deleted, including superseded checkpoints.
        force: Delete even the newest checkpoint, and even while the run is at work according to its record.

    Raises:
        UsageError: The run or checkpoint does not exist, or it is needed and `force` is False.
    """
    record = read_record(run)
    if record.state not in FINAL and not force:
        raise UsageError(
            f"run {run} is {record.state} and may start from a checkpoint at any moment; stop it first, "
            "or pass --force if its driver is dead"
        )
    manifests, counting, _ = _read(run)
    chosen = _choose(run, manifests, steps)
    newest = max((m.step for m in manifests if m.directory in counting), default=None)
    if newest in steps and not force:
        raise UsageError(f"step {newest} is the newest checkpoint of run {run}: without it work is lost; pass --force")
    store = run.store
    held = {hold.directory: name for name, hold in read_holds(store).items()}
    for manifest in chosen:
        if (name := held.get(manifest.directory)) is not None and not force:
            raise UsageError(
                f"step {manifest.step} is held ({name}); remove the tag with `dist-ft checkpoint tag … --remove`, "
                "wait for its reader, or pass --force"
            )
    for manifest in chosen:
        store.delete(manifest.directory)
    return [manifest.directory for manifest in chosen]


def _read(run: Run) -> tuple[list[Manifest], set[str], list[str]]:
    read_record(run)
    store = run.store
    problems: list[str] = []
    manifests = list(read_manifests(store, problems))
    return manifests, {manifest.directory for manifest in follow(read_attempts(store), manifests)}, problems


def _choose(run: Run, manifests: Sequence[Manifest], steps: Sequence[int]) -> list[Manifest]:
    known = sorted({manifest.step for manifest in manifests})
    for step in steps:
        if step not in known:
            shown = ", ".join(map(str, known)) or "none"
            raise UsageError(f"run {run} has no checkpoint at step {step}; there are: {shown}")
    return [manifest for manifest in manifests if not steps or manifest.step in steps]
