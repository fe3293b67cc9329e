"""Shows a run while it works: one live line on a terminal, a few plain lines elsewhere.

Everything is printed to standard error; standard output is for results.
"""

from __future__ import annotations

import sys
import time

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from dist_ft.coordinator.live_status import LiveStatus
from dist_ft.coordinator.story import tell
from dist_ft.metric_rows import EvalRow
from dist_ft.printable import format_duration, printable
from dist_ft.report.table import format_value, metric_name

_PLAIN_EVERY_S = 10.0
_BAR = 24
_LINE = 2000  # most characters of a line; error messages can quote data


def bar(share: float) -> str:
    """Return a progress bar."""
    done = int(_BAR * share)
    return f"{'━' * done}{'╌' * (_BAR - done)}"


class Console:
    """Shows one run. Call `update` with the coordinator's status a few times a second."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._console = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True)
        self._is_quiet = is_quiet
        self._live: Live | None = None
        self._last_eval: EvalRow | None = None
        self._last_plain = 0.0
        self._shown_step = -1
        self._rate: list[tuple[float, int]] = []

    def say(self, line: str, style: str = "") -> None:
        """Print a line above the live one."""
        if not self._is_quiet:
            self._console.print(Text("\n".join(printable(part, _LINE) for part in line.split("\n")), style=style))

    def update(self, status: LiveStatus) -> None:
        """Show what is new in a status; `status.ledger` must hold only new entries."""
        for _, line in tell(status.ledger):
            if line is not None:
                self.say(f"  {line}", "red" if "damaged" in line or "failed" in line else "dim")
        if status.evaluation is not None and status.evaluation != self._last_eval:
            self._last_eval = status.evaluation
            values = status.evaluation.metrics.items()
            shown = ", ".join(f"{metric_name(name)} {format_value(value)}" for name, value in values)
            self.say(f"  {shown} at step {status.evaluation.step}", "cyan")
        if self._is_quiet:
            return
        record, row = status.record, status.row
        step, total = record.step, max(1, record.max_steps)
        if row is None or status.searching:
            doing = status.searching or ", ".join(status.phases) or "waiting for workers"
            line = f"  {record.state}: {doing}"
        else:
            loss = "left out" if row.loss is None else f"{row.loss:.4f}"
            line = (
                f"  {bar(step / total)} step {step}/{total}  loss {loss}  "
                f"{row.tokens_per_s:.0f} tok/s  {row.world_size} workers  ETA {self._eta(step, total)}"
            )
        if self._console.is_terminal:
            self._show_live(line)
            return
        now = time.monotonic()
        is_first_or_last = step in (1, record.max_steps)
        if row and step != self._shown_step and (is_first_or_last or now - self._last_plain > _PLAIN_EVERY_S):
            self._shown_step, self._last_plain = step, now
            self.say(line)

    def progress(self, line: str) -> None:
        """Show the progress of work before the first step."""
        if self._is_quiet:
            return
        if self._console.is_terminal:
            self._show_live(line)
        elif time.monotonic() - self._last_plain > _PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            self.say(line)

    def close(self) -> None:
        """End the live line, leaving its last state on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show_live(self, line: str) -> None:
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(Text(line))

    def _eta(self, step: int, total: int) -> str:
        now = time.monotonic()
        if not self._rate or self._rate[-1][1] != step:
            self._rate = [*self._rate, (now, step)][-20:]
        (began, first), (last, newest) = self._rate[0], self._rate[-1]
        if newest == first:
            return "…"
        return format_duration(max(0.0, (total - step) * (last - began) / (newest - first)))
