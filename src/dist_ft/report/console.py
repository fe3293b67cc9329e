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
from dist_ft.metric_rows import EvalRow
from dist_ft.printable import format_bytes, format_duration, printable
from dist_ft.report.table import METRIC_NAMES, format_value
from dist_ft.run import events
from dist_ft.run.events import LedgerEntry

_PLAIN_EVERY_S = 10.0
_BAR = 24
_LINE = 2000  # most characters of a line; error messages can quote data


def bar(share: float) -> str:
    """Return a progress bar."""
    done = int(_BAR * share)
    return f"{'━' * done}{'╌' * (_BAR - done)}"


def describe_event(entry: LedgerEntry) -> str | None:
    """Return the line for a ledger entry; None for one that is not shown."""
    match entry.event:
        case events.AttemptBegan(world_size=world_size, start_step=start_step):
            resumed = f", going on after step {start_step}" if start_step else ""
            return f"attempt {entry.attempt} on {world_size} workers{resumed}"
        case events.GroupNotStarted(reason=reason):
            return f"the workers could not be started: {reason}"
        case events.GroupLoaded(notes=notes):
            return "; ".join(notes) or None
        case events.Committed(step=step):
            return f"checkpoint at step {step}"
        case events.StopRequested(reason=reason):
            return f"stopping after this step ({reason})"
        case events.CheckpointDamaged(error=error):
            return f"a checkpoint is damaged and passed over: {error}"
        case events.RankLost(rank=rank, step=step, message=message):
            return f"rank {rank} failed after step {step}: {message}"
        case events.SaveFailed(step=step, reason=reason):
            return f"the checkpoint of step {step} failed and is left out: {reason}"
        case events.SaveSkipped(step=step):
            return f"no checkpoint of step {step}: the one before is still being written"
        case events.OverBudget(num_bytes=num_bytes, max_bytes=max_bytes):
            return (
                f"the checkpoints that never go take {format_bytes(num_bytes)}, and checkpoint.max_gib allows "
                f"{format_bytes(max_bytes)}; raise it, or remove a tag"
            )
        case events.ExportFailed(step=step, reason=reason):
            return f"step {step} is not exported: {reason}"
        case events.BatchSkipped(step=step):
            return f"step {step} is left out from now on"
        case events.EarlyStop(step=step, best_step=best_step, metric=metric, patience=patience):
            best = f"the best is step {best_step}" if best_step else "none was a number"
            return f"early stop after step {step} (patience {patience} for {metric}); {best}"
        case events.StragglerFound(rank=rank, times_slower=times_slower, node_ip=node_ip):
            where = f" on {node_ip}" if node_ip else ""
            return f"rank {rank}{where} is {times_slower} times as slow as the others"
        case events.Resizing(reason=reason):
            return f"a checkpoint after this step, then the group is formed anew: {reason}"
        case events.Recovering(step=step, wait_s=wait_s, reason=reason):
            wait = f" in {wait_s:.0f} s" if wait_s else ""
            return f"recovering after step {step}{wait}: {reason}"
        case events.GivingUp(step=step, reason=reason):
            return f"giving up after step {step}: {reason}"
        case events.SettingsChanged(changes=changes):
            return "changed since the last attempt: " + ", ".join(changes)
        case _:
            return None


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
        for entry in status.ledger:
            line = describe_event(entry)
            if line is not None:
                self.say(f"  {line}", "red" if "damaged" in line or "failed" in line else "dim")
        if status.evaluation is not None and status.evaluation != self._last_eval:
            self._last_eval = status.evaluation
            values = status.evaluation.metrics.items()
            shown = ", ".join(f"{METRIC_NAMES.get(name, name)} {format_value(value)}" for name, value in values)
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
