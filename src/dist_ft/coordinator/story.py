"""Tells a run as text: a line for each event of the ledger, and the file `logs/story.log` that holds them.

The story follows from the ledger alone, so a coordinator that begins writes it anew and then goes on with each event.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from dist_ft.errors import StalledError
from dist_ft.monitor.alerts import Alert
from dist_ft.printable import format_bytes, format_duration, printable
from dist_ft.run import events
from dist_ft.run.events import LedgerEntry
from dist_ft.storage.publish import write_whole

_OWN_RANK = re.compile(r"\brank \d+\b")
_MAX_LINE = 2000


def tell(entries: Iterable[LedgerEntry]) -> Iterator[tuple[LedgerEntry, str | None]]:
    """Yield entries with their line; of ranks that were lost one after the other with one error, one entry."""
    lost: list[LedgerEntry] = []
    for entry in entries:
        if isinstance(entry.event, events.RankLost):
            lost.append(entry)
            continue
        yield from _tell_lost(lost)
        lost = []
        yield entry, describe_event(entry)
    yield from _tell_lost(lost)


def _tell_lost(lost: Sequence[LedgerEntry]) -> Iterator[tuple[LedgerEntry, str]]:
    groups: dict[tuple[object, ...], list[tuple[LedgerEntry, events.RankLost]]] = {}
    for entry in lost:
        event = entry.event
        assert isinstance(event, events.RankLost)
        key = (entry.attempt, event.step, event.type, _OWN_RANK.sub("rank", event.message))
        groups.setdefault(key, []).append((entry, event))
    for members in groups.values():
        entry, event = members[0]
        ranks = sorted({member.rank for _, member in members})
        if len(ranks) == 1:
            yield entry, f"rank {ranks[0]} failed after step {event.step}: {event.message}"
        else:
            yield entry, f"ranks {format_ranks(ranks)} failed after step {event.step}: {event.message}"


def format_ranks(ranks: Sequence[int]) -> str:
    """Return `0-3, 7` for sorted ranks."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def story_lines(entries: Iterable[LedgerEntry]) -> list[str]:
    """Return the lines of story.log for entries: time (UTC), attempt and what happened."""
    lines = []
    for entry, text in tell(entries):
        when = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        attempt = "-" if entry.attempt is None else str(entry.attempt)
        lines.append(f"{when}  attempt {attempt:<3}  {printable(text or _plain(entry), _MAX_LINE)}")
    return lines


def _plain(entry: LedgerEntry) -> str:
    """Return an entry that the console does not show, by its facts."""
    facts = ", ".join(f"{key} {value}" for key, value in entry.event.facts().items() if value not in (None, "", []))
    name = entry.name.replace("_", " ")
    return f"{name}: {facts}" if facts else name


def alert_of(run_id: str, entry: LedgerEntry) -> Alert | None:
    """Return the alert that an entry is worth; None for most."""
    event, text = entry.event, describe_event(entry) or _plain(entry)
    match event:
        case events.Recovering(step=step, cause=cause):
            cause_text = f"{cause.get('type', 'failure')}: {cause.get('message', '')}; {text}"
            kind: Literal["hang", "failure"] = "hang" if cause.get("type") == StalledError.__name__ else "failure"
            return Alert(kind, run_id, step, printable(cause_text, _MAX_LINE))
        case events.BatchSkipped(step=step):
            return Alert("spike", run_id, step, text)
        case events.RunFailed(step=step, error=error) if error is not None:
            failure = printable(f"{error['type']}: {error['message']}", _MAX_LINE)
            return Alert("failed", run_id, step, f"failed after step {step}: {failure}")
        case events.RunCompleted(step=step):
            return Alert("finished", run_id, step, f"completed after step {step}")
        case events.RunStopped(step=step):
            return Alert("stopped", run_id, step, f"stopped after step {step}")
    return None


class Story:
    """Writes logs/story.log. Lost ranks wait for the event after them, so that one error is one line.

    Args:
        path: The file; what it holds is replaced.
        entries: Entries of the ledger so far.
    """

    def __init__(self, path: Path, entries: Sequence[LedgerEntry]) -> None:
        self._lost: list[LedgerEntry] = []
        write_whole(path, "".join(f"{line}\n" for line in story_lines(entries)), is_durable=False)
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: LedgerEntry) -> None:
        """Add an entry."""
        if isinstance(entry.event, events.RankLost):
            self._lost.append(entry)
            return
        self._write([*self._lost, entry])
        self._lost = []

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._write(self._lost)
        self._file.close()

    def _write(self, entries: Sequence[LedgerEntry]) -> None:
        for line in story_lines(entries):
            self._file.write(f"{line}\n")
        self._file.flush()


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
        case events.SaveStreamed(step=step, rank=rank, needed=needed, free=free):
            return (
                f"the checkpoint of step {step} is written without a copy, and training waits for it: the node of rank "
                f"{rank} has {format_bytes(free)} free, and copies take {format_bytes(needed)}"
            )
        case events.IntervalChosen(interval_s=interval_s, num_steps=num_steps, cost_s=cost_s, mtbf_s=mtbf_s):
            return (
                f"a checkpoint every {format_duration(interval_s)}, about {num_steps} steps: one costs {cost_s:.2f} s, "
                f"a failure is expected every {format_duration(mtbf_s)}"
            )
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
