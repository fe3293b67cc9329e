"""The ledger: every event through the file and back, in the documented form."""

from __future__ import annotations

from pathlib import Path

from dist_ft.run import events
from dist_ft.run.events import Event, Ledger, LedgerEntry, read_ledger
from tests.helpers.rows import read_rows

CAUSE = {"type": "NodeLostError", "message": "10.0.0.3 is gone"}
EVENTS: list[Event] = [
    events.AttemptBegan(2, 0),
    events.GroupNotStarted("no module"),
    events.GroupLoaded(40, 2**40, ["workers: 2 → 3"]),
    events.FirstStep({"group": 1.5}),
    events.Committed(40),
    events.SaveFailed(40, "disk full"),
    events.SaveSkipped(20),
    events.SaveStreamed(20, 3, 2**40, 2**30),
    events.IntervalChosen(20, 416.0, 208, 1.0, 86_400.0),
    events.OverBudget(40, 2**40, 2**30),
    events.CheckpointDamaged(None, "manifest.json is missing"),
    events.Exported(60, "checkpoints/step-00000060-a0001"),
    events.Exported(60, "checkpoints/step-00000060-a0002", "exports/step-00000060-a0002"),
    events.ExportFailed(60, "ExportError: too little memory"),
    events.SettingsChanged(["a.b: 1 → 2"]),
    events.StopRequested("SIGTERM"),
    events.EarlyStop(40, None, "eval_loss", 2),
    events.StragglerFound(1, 2.5, None),
    events.RankLost(1, 7, "WorkerCrashError", "died"),
    events.Resizing(5, "room for 2 workers"),
    events.Recovering(5, 1.5, "restart 1 of 20", CAUSE),
    events.GivingUp(5, 0.0, "20 restarts", CAUSE),
    events.BatchSkipped(8),
    events.CoordinatorRestarted(1),
    events.RunCompleted(60),
    events.RunStopped(41),
    events.RunFailed(41, CAUSE),
    events.RunFailed(41),
]


def test_every_event_has_an_example_here() -> None:
    assert {type(event) for event in EVENTS} == set(Event.__subclasses__()) - {events.UnknownEvent}


def test_a_ledger_reads_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number, event in enumerate(EVENTS):
        ledger.add(event, number or None)
    ledger.close()
    assert read_ledger(tmp_path / "ledger.jsonl") == ledger.entries
    assert [entry.event for entry in ledger.entries] == EVENTS


def test_an_entry_stands_in_the_file_as_time_event_attempt_and_facts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add(events.SettingsChanged([]), None)
    ledger.add(events.AttemptBegan(2, 40), 3)
    ledger.add(events.RunFailed(41), 3)
    ledger.close()
    changed, began, failed = read_rows(tmp_path / "ledger.jsonl")
    assert list(changed) == ["time", "event", "changes"]
    assert list(began) == ["time", "event", "attempt", "world_size", "start_step"]
    assert (began["event"], began["attempt"]) == ("attempt", 3)
    assert list(failed) == ["time", "event", "attempt", "step"]


def test_an_event_of_another_version_keeps_its_facts() -> None:
    entry = {"time": 1.0, "event": "gossip", "attempt": 2, "step": 4, "who": ["a"]}
    found = LedgerEntry.from_dict(entry)
    assert (found.name, found.event.facts()) == ("gossip", {"step": 4, "who": ["a"]})
    assert found.to_dict() == entry


def test_a_fact_that_another_version_adds_is_passed_over() -> None:
    entry = {"time": 1.0, "event": "commit", "attempt": 2, "step": 4, "num_bytes": 5}
    assert LedgerEntry.from_dict(entry).event == events.Committed(4)


def test_a_damaged_entry_is_unknown_and_a_line_that_is_none_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = ['{"time": 1.0, "event": "commit"}', "7", "{}", '{"time": 2.0, "event": "commit", "step": 4}']
    path.write_text("".join(f"{line}\n" for line in lines))
    assert [entry.event for entry in read_ledger(path)] == [events.UnknownEvent("commit", {}), events.Committed(4)]
