"""The records of a run: what lies on disk after each message, sent without Ray."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dist_ft.checkpoint.lineage import read_attempts, take_attempt
from dist_ft.messages import (
    EvalDone,
    Loaded,
    NodeSampled,
    Outcome,
    RankDone,
    RankFailed,
    RankStarted,
    Staged,
)
from dist_ft.metric_rows import EvalRow, StepRow
from dist_ft.monitor.sink import Answers, step_numbers
from dist_ft.run.events import SettingsChanged
from dist_ft.run.place import open_run
from dist_ft.slices import WrittenFile
from dist_ft.storage.publish import read_json
from tests.helpers.rows import last_rows, read_rows
from tests.helpers.simulated_run import ENDED, RUN_ID, WORLD_SIZE, SimulatedRun

STEERED = {"every_steps": 10, "best_metric": "eval_loss", "early_stopping": {"patience": 2}}


def test_a_run_is_on_disk_before_its_first_attempt(run: SimulatedRun) -> None:
    record = read_json(run.dir.run_json)
    assert (record["run_id"], record["state"], record["attempt"], record["max_steps"]) == (
        RUN_ID,
        "starting",
        0,
        60,
    )
    assert read_attempts(run.store) == []


def test_the_record_says_who_works(run: SimulatedRun) -> None:
    run.open()
    record = read_json(run.dir.run_json)
    assert record["state"] == "running"
    assert (record["attempt"], record["world_size"], record["step"]) == (1, 2, 0)
    assert record["workers"] == [
        {"rank": 0, "pid": 1000, "node_ip": "10.0.0.1"},
        {"rank": 1, "pid": 1001, "node_ip": "10.0.0.1"},
    ]


def test_a_run_is_starting_until_every_rank_is_there(run: SimulatedRun) -> None:
    run.open(start=False)
    run.send(1, RankStarted(7, "10.0.0.2"))
    assert read_json(run.dir.run_json)["state"] == "starting"
    run.send(0, RankStarted(6, "10.0.0.1"))
    assert read_json(run.dir.run_json)["state"] == "running"


def test_what_the_driver_finds_goes_into_the_ledger(run: SimulatedRun) -> None:
    run.coordinator.add_event(SettingsChanged(["train.micro_batch_size: 1 → 2"]))
    assert run.events("settings_changed")[0]["changes"] == ["train.micro_batch_size: 1 → 2"]


def test_a_row_that_is_sent_twice_is_written_once(run: SimulatedRun) -> None:
    run.open()
    for step in (1, 1, 2, 2, 1, 3):
        run.step(step)
    assert [row["step"] for row in read_rows(run.dir.metrics)] == [1, 2, 3]
    assert run.sink.steps == [1, 2, 3]
    assert run.coordinator.status().record.step == 3


def test_replayed_steps_are_written_again_and_the_last_row_counts(run: SimulatedRun) -> None:
    run.open()
    for step in (1, 2, 3):
        run.step(step, loss=5.0)
    run.open()
    for step in (1, 2):
        run.step(step, loss=4.0)
    assert [(row["step"], row["attempt"]) for row in read_rows(run.dir.metrics)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (1, 2),
        (2, 2),
    ]
    assert {step: row["loss"] for step, row in last_rows(run.dir.metrics).items()} == {1: 4.0, 2: 4.0, 3: 5.0}


def test_an_evaluation_is_written_and_shown(run: SimulatedRun) -> None:
    run.open()
    run.send(0, EvalDone(EvalRow(0, 1, {"eval_loss": 3.5})))
    assert read_rows(run.dir.evals) == [{"step": 0, "attempt": 1, "eval_loss": 3.5}]
    assert run.coordinator.status().evaluation.eval_loss == 3.5
    assert run.sink.evals == [0]


@pytest.mark.parametrize(("last_step", "stops"), [(30, [(30, 10, 2)]), (60, [])])
def test_a_run_that_ends_early_says_so(tmp_path: Path, last_step: int, stops: list[tuple[int, int, int]]) -> None:
    run = SimulatedRun(open_run(tmp_path / "run"), evaluation=STEERED)
    run.open()
    for step, loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        run.send(0, EvalDone(EvalRow(step, 1, {"eval_loss": loss})))
    for rank in range(WORLD_SIZE):
        run.send(rank, RankDone("completed", last_step))
    assert run.coordinator.outcome() == "completed"
    found = [(row["step"], row["best_step"], row["patience"]) for row in run.events("early_stop")]
    assert found == stops
    assert read_json(run.dir.run_json)["step"] == last_step


def test_a_status_survives_the_way_to_the_driver(run: SimulatedRun) -> None:
    run.open()
    run.step(1)
    run.commit(10)
    status = run.coordinator.status()
    assert pickle.loads(pickle.dumps(status)) == status
    assert status.phases == ["load"]


def test_a_failed_rank_fails_the_attempt(run: SimulatedRun) -> None:
    run.open()
    run.step(3)
    run.send(0, RankDone("completed", 60))
    run.send(1, RankFailed(ENDED))
    assert run.coordinator.outcome() == "failed"
    (failure,) = run.coordinator.status().failures
    assert (failure.rank, failure.type, failure.message) == (1, ENDED["type"], ENDED["message"])
    assert run.events("rank_failed")[0]["rank"] == 1


@pytest.mark.parametrize("outcome", ["completed", "stopped"])
def test_the_group_has_ended_once_all_ranks_have(run: SimulatedRun, outcome: Outcome) -> None:
    run.open()
    run.send(1, RankDone(outcome, 60))
    assert run.coordinator.outcome() is None
    run.send(0, RankDone(outcome, 60))
    assert run.coordinator.outcome() == outcome
    assert run.coordinator.status().record.step == 60


@pytest.mark.parametrize(
    ("stop", "state", "error"),
    [(False, "completed", None), (True, "stopped", None), (False, "failed", ENDED)],
)
def test_the_end_is_on_disk(run: SimulatedRun, stop: bool, state: str, error: dict[str, str] | None) -> None:
    run.open()
    run.step(1)
    if stop:
        run.dir.stop_request.write_text("{}")
        run.tick()
    run.coordinator.finish(state, {"final_loss": 1.0}, error)
    record = read_json(run.dir.run_json)
    assert (record["state"], record["result"], record["error"]) == (state, {"final_loss": 1.0}, error)
    assert (record["workers"], record["step"]) == ([], 1)
    assert not run.dir.stop_request.exists()
    assert run.sink.states == [state]
    assert [entry["step"] for entry in run.events(state)] == [1]


def test_an_end_that_cannot_follow_is_refused(run: SimulatedRun) -> None:
    run.open()
    with pytest.raises(ValueError, match="from running to stopped"):
        run.coordinator.finish("stopped", {})
    assert read_json(run.dir.run_json)["state"] == "running"


def test_numbers_of_every_node_go_to_the_sinks_once_and_not_into_metrics_jsonl(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[StepRow] = []
    monkeypatch.setattr(run.sink, "log_step", rows.append)
    run.open()
    for rank, node in ((0, "10.0.0.1"), (1, "10.0.0.2")):
        run.send(rank, NodeSampled(node, {"cpu_percent": 50.0 + rank}))
    run.step(1)
    run.step(2)
    first, second = (step_numbers(row) for row in rows)
    assert first["system/10.0.0.1/cpu_percent"] == 50.0
    assert first["system/10.0.0.2/cpu_percent"] == 51.0
    assert first["train/loss"] == 1.0
    assert not [name for name in second if name.startswith("system/")]
    assert "system" not in run.dir.metrics.read_text()


def test_the_cost_of_a_checkpoint_and_of_a_recovery_go_to_the_sinks_with_the_next_step(
    run: SimulatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[StepRow] = []
    monkeypatch.setattr(run.sink, "log_step", rows.append)
    run.open()
    for rank in range(WORLD_SIZE):
        run.send(rank, Loaded(0, 0, []))
    run.step(1)
    for rank in range(WORLD_SIZE):
        run.send(rank, Staged(1, WrittenFile(f"slices-{rank}", 0, ""), None, blocked_s=0.25 + rank, written_s=1.5))
    run.step(2)
    run.step(3)
    run.send(1, RankFailed({"type": "ValueError", "message": "x"}))
    run.coordinator.decide("", [], run.now)
    run.open()
    for rank in range(WORLD_SIZE):
        run.send(rank, Loaded(0, 0, []))
    run.step(1)
    costs = [
        {name: value for name, value in step_numbers(row).items() if name.startswith(("checkpoint/", "run/recovery"))}
        for row in rows
    ]
    assert costs[:3] == [{}, {"checkpoint/blocked_s": 0.25, "checkpoint/written_s": 1.5}, {}]
    assert list(costs[3]) == ["run/recovery_s"]
    assert costs[3]["run/recovery_s"] >= 0
    assert "recovery_s" not in run.dir.metrics.read_text()


def test_answers_go_to_the_sinks_of_the_newest_driver_only(run: SimulatedRun) -> None:
    run.open()
    run.coordinator.record_answers(Answers(60, [{"prompt": "a", "reference": "b", "tuned": "c"}]))
    assert run.sink.answers == [60]
    take_attempt(run.store, None, None)
    run.coordinator.tick(run.now)
    run.coordinator.record_answers(Answers(60, [{"prompt": "a", "reference": "b", "tuned": "c"}]))
    assert run.sink.answers == [60]
