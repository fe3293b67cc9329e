"""Prints the output of a job as it comes, and keeps the result that `dist-ft train --json` prints last."""

from __future__ import annotations

import codecs
import contextlib
from pathlib import Path

from dist_ft.run.outcome import RunResult

_RESULT_START = '{"run_dir": '


class Output:
    """Prints the lines of a job's log as they come, each once, and keeps the result.

    Attributes:
        result: What `train --json` has printed, once it has come.
        num_seen: Characters of the log so far.
    """

    def __init__(self) -> None:
        self.result: RunResult | None = None
        self.num_seen = 0
        self._num_skipped = 0
        self._rest = ""

    def restart(self) -> None:
        """Expect the log again from its beginning."""
        self._num_skipped = self.num_seen

    def add(self, text: str) -> None:
        """Take the next part of the log."""
        skipped = min(self._num_skipped, len(text))
        self._num_skipped -= skipped
        self.num_seen += len(text) - skipped
        *lines, self._rest = (self._rest + text[skipped:]).split("\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Show a last line that does not end in a line break."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""

    def _show(self, line: str) -> None:
        found = find_result(line)
        if found is None:
            print(line, flush=True)
        else:
            self.result = found


class FileOutput(Output):
    """Prints what a job appends to a file of this machine."""

    def __init__(self) -> None:
        super().__init__()
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def read(self, path: Path) -> None:
        """Print what is new in the file, which need not exist yet."""
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
            self._offset += len(data)
            self.add(self._decoder.decode(data))


def find_result(log: str) -> RunResult | None:
    """Return the last result of `train --json` in a log, if there is one."""
    for line in reversed(log.splitlines()):
        if line.startswith(_RESULT_START):
            with contextlib.suppress(ValueError):
                return RunResult.from_json(line)
    return None
