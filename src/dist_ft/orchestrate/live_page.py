"""Keeps the page about a run up to date, in a process of its own at the lowest priority."""

from __future__ import annotations

import logging
import os
import subprocess
import time

from dist_ft.machine import OWN_PYTHON
from dist_ft.run.place import Run
from dist_ft.storage.store import file_parts

logger = logging.getLogger(__name__)

_NICENESS = 19
_LIMIT_S = 120.0


class LivePage:
    """Rebuilds `report.html` of a run. A page that cannot be made is a warning.

    Args:
        run: The run.
        every_s: Seconds between two pages; None makes none.
    """

    def __init__(self, run: Run, every_s: float | None) -> None:
        self._run = run
        self._every_s = every_s
        self._begun_at = float("-inf")
        self._process: subprocess.Popen[bytes] | None = None

    def advance(self) -> None:
        """Begin a page if it is time for one, and none is being made."""
        if self._every_s is None or not self._has_rows():
            return
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() - self._begun_at >= self._every_s:
            self._begin()

    def begin_last(self) -> None:
        """Begin the page of a run that has ended; `wait` ends it."""
        if self._every_s is not None and self._has_rows():
            self.wait()
            self._begin()

    def wait(self) -> None:
        """Wait for the page that is being made, and send it to a run at a URL."""
        if self._process is None:
            return
        try:
            if self._process.wait(_LIMIT_S) != 0:
                logger.warning("%s could not be made; `dist-ft report %s` says why", self._run.report.name, self._run)
            elif self._run.is_remote:
                self._run.store.put(self._run.report.name, file_parts(self._run.report))
        except (subprocess.TimeoutExpired, OSError) as error:
            self._process.kill()
            logger.warning("%s is not up to date: %s", self._run.report.name, error)
        self._process = None

    def _has_rows(self) -> bool:
        return self._run.metrics.exists() and self._run.metrics.stat().st_size > 0

    def _begin(self) -> None:
        self._begun_at = time.monotonic()
        command = [*OWN_PYTHON, "-m", "dist_ft.cli", "report", self._run.address, "--to", str(self._run.report)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICENESS)
        except OSError as error:
            logger.warning("no page for now: %s", error)
