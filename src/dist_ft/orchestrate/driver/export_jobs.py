"""Exports checkpoints, one at a time: while training goes on, and the last ones after it.

The work is done by a process of this node's fork server, with its own limit of threads and a low priority, so no rank
waits for it. It appears under its name when it is whole; then the ledger has it; then the names are pointed at it; then
those that nobody needs any more go. Killed between any two of these, the next driver goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from typing import Any

from dist_ft.checkpoint.lineage import committed, newest_number
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.errors import DistFtError
from dist_ft.jobs.spec import export_task
from dist_ft.orchestrate.driver.session import Session, in_thread
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.printable import printable
from dist_ft.run.events import Committed, Exported, ExportFailed
from dist_ft.run.exports import (
    BEST,
    FINAL,
    LATEST,
    Export,
    folder_of,
    missed_exports,
    name_for,
    next_export,
    read_exports,
    surplus_exports,
)
from dist_ft.run.log import read_evals
from dist_ft.run.place import Run
from dist_ft.run.scores import best_first

logger = logging.getLogger(__name__)

_POLL_S = 0.25
_MESSAGE = 500


class BackgroundExports:
    """Exports what `export` of the config asks for while training goes on. Call `advance` a few times a second.

    A failed export, or one that finds too little memory, is said in the ledger and ends nothing.

    Args:
        session: The driver.
    """

    def __init__(self, session: Session) -> None:
        wanted = session.config.export
        self._session = session
        self._is_wanted = wanted.latest or wanted.best or wanted.every_steps is not None
        self._running: tuple[Manifest, str, Future[dict[str, Any]]] | None = None
        self._failed: set[str] = set()
        self._given_up: set[int] = set()
        self._committed: set[int] = set()
        self._should_look = True
        self._max_steps = 0

    def advance(self, status: LiveStatus) -> None:
        """Take the result of an export that has ended, and begin the next one, without waiting."""
        if not self._is_wanted or not status.record.attempt:
            return
        self._max_steps = status.record.max_steps
        new = {entry.event.step for entry in status.ledger if isinstance(entry.event, Committed)}
        self._committed |= new
        self._should_look = self._should_look or bool(new)
        try:
            self._take()
            if self._running is None and self._should_look:
                self._begin(status.record.attempt)
        except (OSError, DistFtError) as error:  # the store does not answer now; the next commit looks again
            logger.warning("no export for now: %s", error)
            self._should_look = False

    def finish(self, check: Callable[[], None]) -> None:
        """Wait for the export that is running; `check` is called now and then and may raise."""
        while self._running is not None:
            check()
            try:
                self._running[2].exception(_POLL_S)
            except TimeoutError:
                continue
            self._take()

    def _begin(self, attempt: int) -> None:
        session, run_dir = self._session, self._session.run_dir
        if newest_number(run_dir.store) != attempt:
            return  # another driver exports now
        manifests = committed(run_dir.store)
        exports = read_exports(run_dir)
        known = {m.step for m in manifests} | {e.step for e in exports} | self._given_up
        for step in missed_exports(session.config.export.every_steps, self._committed, known):
            self._give_up(
                step, "its checkpoint went before the exports before it were made; raise checkpoint.keep_last"
            )
        done = folder_of(exports).keys() | self._failed
        manifest = next_export(session.config, manifests, done, self._ranking())
        self._should_look = manifest is not None
        self._point(manifests, exports)
        if manifest is None:
            return
        name = prepare_name(session.run_dir, manifest, exports)
        task = export_task(session.config, run_dir, manifest, name, is_beside_training=True)
        future = in_thread(lambda: run_task(session.server.socket_path, task.name, task.arguments))
        self._running = (manifest, name, future)

    def _take(self) -> None:
        """Record an export that has ended, and point the names."""
        if self._running is None or not self._running[2].done():
            return
        manifest, name, future = self._running
        self._running, self._should_look = None, True
        error = future.exception()
        if error is not None:
            self._failed.add(manifest.directory)
            self._give_up(manifest.step, f"{type(error).__name__}: {error}")
            return
        self._session.coordinator.add_event(Exported(manifest.step, manifest.directory, name))
        self._session.console.say(f"  exported step {manifest.step} while training goes on", "dim")

    def _give_up(self, step: int, reason: str) -> None:
        self._given_up.add(step)
        self._session.coordinator.add_event(ExportFailed(step, printable(reason, _MESSAGE)))

    def _point(self, manifests: Sequence[Manifest], exports: Sequence[Export]) -> None:
        """Point `exports/latest` and `exports/best`, and delete what they have left behind."""
        session, folders = self._session, folder_of(exports)
        exported = [manifest for manifest in manifests if manifest.directory in folders]
        if not exported:
            return
        run_dir = session.run_dir
        point(run_dir, LATEST, folders[exported[-1].directory])
        of_step = {manifest.step: manifest for manifest in exported}
        best = next((of_step[step] for step in self._ranking() if step in of_step), None)
        if session.config.export.best and best is not None:
            point(run_dir, BEST, folders[best.directory])
        for folder in surplus_exports(session.config, exports, pointed_folders(run_dir)):
            run_dir.store.delete(folder)

    def _ranking(self) -> list[int]:
        evals = self._session.run_dir.evals
        return best_first(self._session.config.eval, lambda: read_evals(evals).values(), self._max_steps)


def export_now(session: Session, manifest: Manifest) -> str:
    """Export a checkpoint after the training, unless it is exported, and return the folder.

    Raises:
        DistFtError: The export failed.
    """
    exports = read_exports(session.run_dir)
    if (known := folder_of(exports).get(manifest.directory)) is not None:
        return known
    name = prepare_name(session.run_dir, manifest, exports)
    session.console.say(f"  exporting step {manifest.step}")
    session.run_tasks([export_task(session.config, session.run_dir, manifest, name)])
    session.coordinator.add_event(Exported(manifest.step, manifest.directory, name))
    return name


def prepare_name(run_dir: Run, manifest: Manifest, exports: Sequence[Export]) -> str:
    """Return the folder for an export, once nothing is in it: neither an upload that was cut off, nor an old export."""
    name = name_for(run_dir, manifest, exports, pointed_folders(run_dir))
    for folder in run_dir.store.folders("exports"):
        hidden = folder.rpartition("/")[2]
        if hidden.startswith((".step-", ".deleted-step-")):  # of an export or a deletion that was killed
            run_dir.store.delete(folder)
    if run_dir.has(name):
        run_dir.store.delete(name)
    return name


def pointed_folders(run_dir: Run) -> set[str]:
    """Return the folders that a name points at."""
    return {target for name in (FINAL, BEST, LATEST) if (target := run_dir.pointed_at(name))}


def point(run_dir: Run, name: str, folder: str) -> str:
    """Point a name at an export, unless it does already, and return the export's address."""
    if run_dir.pointed_at(name) != folder:
        run_dir.point(name, folder.rpartition("/")[2])
    return run_dir.address_of(folder)
