"""Shows what the ranks of a run have written, and the run's story. The same text of many ranks is shown once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dist_ft.coordinator.story import format_ranks
from dist_ft.errors import UsageError
from dist_ft.run.place import Run
from dist_ft.run.status import read_record

_RANK_LOG = re.compile(r"logs/attempt-(\d+)/rank-(\d+)\.log")
_STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
_OWN_RANK = re.compile(r"\brank \d+\b")
_TRACEBACK = "Traceback (most recent call last):"
_STORY = "logs/story.log"


@dataclass(frozen=True)
class RankLog:
    """What one rank of one attempt has written."""

    attempt: int
    rank: int
    text: str


def read_rank_logs(run: Run, attempt: int | None = None, rank: int | None = None) -> list[RankLog]:
    """Return the logs of the ranks of an attempt, by rank.

    Args:
        run: The run.
        attempt: The attempt; None means the newest that has logs.
        rank: The rank; None means all.

    Raises:
        UsageError: No run exists at that path, or there is no such log; the message says which there are.
    """
    read_record(run)
    found = {(int(m[1]), int(m[2])): name for name in run.store.names("logs") if (m := _RANK_LOG.fullmatch(name))}
    if not found:
        raise UsageError(f"run {run} has no rank logs yet; they come with its first attempt")
    attempts = sorted({number for number, _ in found})
    chosen = attempts[-1] if attempt is None else attempt
    ranks = sorted(number for of_attempt, number in found if of_attempt == chosen)
    if not ranks:
        raise UsageError(f"run {run} has no logs of attempt {chosen}; there are: {format_ranks(attempts)}")
    if rank is not None and rank not in ranks:
        raise UsageError(f"attempt {chosen} of run {run} has no log of rank {rank}; there are: {format_ranks(ranks)}")
    return [
        RankLog(chosen, number, run.store.read(found[chosen, number]).decode(errors="replace"))
        for number in ranks
        if rank in (None, number)
    ]


def read_story(run: Run) -> str:
    """Return logs/story.log.

    Raises:
        UsageError: No run exists at that path, or it has no story.
    """
    read_record(run)
    try:
        return run.store.read(_STORY).decode(errors="replace")
    except FileNotFoundError:
        raise UsageError(f"run {run} has no {_STORY}; it is of an earlier version, or has not begun") from None


def render_logs(logs: Sequence[RankLog]) -> Iterator[str]:
    """Yield the text of each rank; an error that an earlier rank had, too, is only referred to."""
    seen: dict[str, int] = {}
    for log in logs:
        yield f"==> attempt-{log.attempt:04d}/rank-{log.rank:05d}.log <=="
        text, error = _cut_error(log.text)
        first = seen.setdefault(_without_own(error), log.rank) if error else log.rank
        yield text + (error if first == log.rank else f"[ends with the same error as rank {first}]\n")


def grep_logs(logs: Sequence[RankLog], pattern: re.Pattern[str]) -> Iterator[str]:
    """Yield the lines in which a pattern is found, in their order; a line of several ranks once, with its ranks."""
    ranks: dict[str, list[int]] = {}
    shown: dict[str, str] = {}
    for log in logs:
        for line in log.text.splitlines():
            if pattern.search(line):
                key = _without_own(line)
                shown.setdefault(key, line)
                if log.rank not in ranks.setdefault(key, []):
                    ranks[key].append(log.rank)
    for key, line in shown.items():
        label = "rank" if len(ranks[key]) == 1 else "ranks"
        yield f"{label} {format_ranks(sorted(ranks[key]))}: {line}"


def _cut_error(text: str) -> tuple[str, str]:
    """Return a log's text before its last traceback, and from there on."""
    at = text.rfind(_TRACEBACK)
    return (text, "") if at < 0 else (text[:at], text[at:])


def _without_own(text: str) -> str:
    """Return text without what differs from rank to rank: times and the rank's own number."""
    return "\n".join(_OWN_RANK.sub("rank", _STAMP.sub("", line)) for line in text.splitlines())
