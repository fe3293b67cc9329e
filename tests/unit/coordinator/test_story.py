"""The story of a run: a line an event, one line for one error of many ranks, the same after a restart."""

from __future__ import annotations

from pathlib import Path

from dist_ft.coordinator.story import format_ranks, story_lines, tell
from dist_ft.messages import RankFailed
from dist_ft.run.events import Committed, LedgerEntry, RankLost, Recovering
from tests.helpers.simulated_run import ENDED, SimulatedRun


def lost(rank: int, message: str, step: int = 7) -> LedgerEntry:
    return LedgerEntry(10.0, 1, RankLost(rank, step, "WorkerCrashError", message))


def test_one_error_of_many_ranks_is_one_line() -> None:
    entries = [
        lost(0, "rank 0 lost its peer"), lost(3, "no room"), lost(1, "rank 1 lost its peer"),
        lost(2, "rank 2 lost its peer"), LedgerEntry(11.0, 1, Committed(8)), lost(5, "rank 5 lost its peer"),
    ]  # fmt: skip
    assert [line for _, line in tell(entries)] == [
        "ranks 0-2 failed after step 7: rank 0 lost its peer", "rank 3 failed after step 7: no room",
        "checkpoint at step 8", "rank 5 failed after step 7: rank 5 lost its peer",
    ]  # fmt: skip


def test_ranks_are_written_as_spans() -> None:
    assert format_ranks([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_ranks(range(1000)) == "0-999"


def test_every_event_has_a_line_with_its_time_and_attempt() -> None:
    entries = [
        LedgerEntry(0.0, None, Committed(8)),
        LedgerEntry.from_dict({"time": 86_400.0, "event": "from_the_future", "attempt": 12, "fact": "x\n\x1b[2J"}),
        LedgerEntry(1.0, 1, Recovering(5, 0.0, "restart 1 of 20", ENDED)),
    ]
    assert story_lines(entries) == [
        "1970-01-01 00:00:00  attempt -    checkpoint at step 8",
        "1970-01-02 00:00:00  attempt 12   from the future: fact x\\n\\x1b[2J",
        "1970-01-01 00:00:01  attempt 1    recovering after step 5: restart 1 of 20",
    ]


def story(run: SimulatedRun) -> list[str]:
    path: Path = run.dir.story
    return path.read_text(encoding="utf-8").splitlines()


def test_the_story_grows_with_the_run_and_is_the_same_after_a_restart(run: SimulatedRun) -> None:
    run.open()
    run.commit(10)
    for rank in (0, 1):
        run.send(rank, RankFailed({**ENDED, "message": f"rank {rank} died"}, is_death=True))
    run.coordinator.decide("gone", [], run.now)
    told = [line.split("  ")[-1] for line in story(run)]
    assert told[0] == "attempt 1 on 2 workers"
    assert "checkpoint at step 10" in told
    (failure,) = [line for line in told if "failed" in line]
    assert failure == "ranks 0-1 failed after step 0: rank 0 died"
    before = story(run)
    run.restart()
    assert story(run) == before
    run.open()
    assert story(run)[: len(before)] == before
    assert len(story(run)) == len(before) + 1
