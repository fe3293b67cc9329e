"""Says which checkpoints of a run are exported, which is exported next, and which exports may go. Pure but for reads.

An export is believed once the ledger has its `Exported`, which is written after the directory has its name. Links such
as `exports/latest` point only at those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config
from dist_ft.layout import RunDir
from dist_ft.run.events import Event, Exported, read_ledger
from dist_ft.run.place import Run

FINAL, BEST, LATEST = "exports/final", "exports/best", "exports/latest"
"""Names that point at an export."""
_SPARE = 2
"""Exports that stay although no name points at them any more: who resolved a name a moment ago still loads them."""


@dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        step: Completed steps of the model.
        checkpoint: Folder of the checkpoint that it was made from.
        directory: Its folder, relative to the run, such as `exports/step-00000040`.
    """

    step: int
    checkpoint: str
    directory: str


def read_exports(run: Run) -> list[Export]:
    """Return the finished exports of a run, in the order in which they were made."""
    events = [entry.event for entry in read_ledger(run.ledger)]
    return find_exports(run, events, run.store.folders("exports"))


def find_exports(run_dir: RunDir, events: Sequence[Event], folders: Collection[str]) -> list[Export]:
    """Return the exports that the ledger names and that are there; of one folder the newest."""
    found: dict[str, Export] = {}
    for event in events:
        if isinstance(event, Exported):
            directory = event.directory or run_dir.export_name(event.step)
            found.pop(directory, None)
            found[directory] = Export(event.step, event.checkpoint, directory)
    return [export for directory, export in found.items() if directory in folders]


def next_export(
    config: Config, manifests: Sequence[Manifest], done: Collection[str], ranking: Sequence[int]
) -> Manifest | None:
    """Return the checkpoint that should be exported next while training goes on; None if there is none.

    The best comes first, then those of `export.every_steps` from the oldest on, then the newest.

    Args:
        config: The run config.
        manifests: The checkpoints that count.
        done: Folders of checkpoints that are exported, or whose export failed.
        ranking: Measured steps, the best first.
    """
    wanted = config.export
    ordered = sorted(manifests, key=lambda m: (m.step, m.attempt))
    of_step = {manifest.step: manifest for manifest in ordered}
    best = next((of_step[step] for step in ranking if step in of_step), None)
    candidates = [best] if wanted.best and best is not None else []
    if wanted.every_steps is not None:
        candidates += [manifest for manifest in ordered if manifest.step % wanted.every_steps == 0]
    if wanted.latest:
        candidates += ordered[-1:]
    return next((manifest for manifest in candidates if manifest.directory not in done), None)


def missed_exports(every_steps: int | None, committed: Collection[int], known: Collection[int]) -> list[int]:
    """Return the steps whose checkpoint went before its export could begin.

    Args:
        every_steps: `export.every_steps`.
        committed: Steps that were committed.
        known: Steps whose checkpoint is still there, is exported, or was given up.
    """
    return [step for step in sorted(committed) if every_steps and step % every_steps == 0 and step not in known]


def surplus_exports(config: Config, exports: Sequence[Export], pointed: Collection[str]) -> list[str]:
    """Return the folders of exports that may go: those that `latest` and `best` have left behind.

    Those of `export.every_steps` stay, and so do the targets of names, and the two newest of the others.

    Args:
        config: The run config.
        exports: All exports, in the order in which they were made.
        pointed: Folders that a name points at.
    """
    every = config.export.every_steps
    others = [e.directory for e in exports if not (every and e.step % every == 0) and e.directory not in pointed]
    return others[: max(0, len(others) - _SPARE)]


def name_for(run_dir: RunDir, manifest: Manifest, exports: Sequence[Export], pointed: Collection[str]) -> str:
    """Return the folder for a checkpoint's export; a folder that a name points at is never written anew.

    Before a fork another attempt may have exported its checkpoint of the same step.
    """
    plain = run_dir.export_name(manifest.step)
    owner = {export.directory: export.checkpoint for export in exports}.get(plain)
    is_taken = plain in pointed and owner != manifest.directory
    return f"{plain}-a{manifest.attempt:04d}" if is_taken else plain


def folder_of(exports: Sequence[Export]) -> Mapping[str, str]:
    """Return checkpoint folder → export folder, the newest of each."""
    return {export.checkpoint: export.directory for export in exports}
