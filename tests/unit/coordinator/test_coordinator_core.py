"""The coordinator, driven message by message in a directory, without Ray: what lies on disk counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.checkpoint.lineage import committed, read_attempts
from dist_ft.checkpoint.manifest import Fingerprint, Manifest, verify_files
from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.config import Config
from dist_ft.coordinator import core
from dist_ft.coordinator.core import Coordinator, Prepared
from dist_ft.coordinator.sizing import ClusterView
from dist_ft.errors import CheckpointError, StaleAttemptError
from dist_ft.layout import last_rows, read_json, read_rows, slices_name
from dist_ft.messages import (
    Envelope,
    EvalDone,
    Heartbeat,
    Leaving,
    Located,
    Message,
    Outcome,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    Reply,
    SaveFailed,
    Staged,
    StepDone,
    Whereabouts,
)
from dist_ft.run.place import RunPlace, open_run
from dist_ft.run.state import RunRecord
from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey
from dist_ft.storage.store import LocalStore

RUN_ID = "full"
WORLD_SIZE = 2
MARK = Fingerprint("model-hash", "data-hash", 0, "kind=full", 8)
PARAMS = (ParamInfo("w", (4, 5), "w"), ParamInfo("b", (3,), "b"))
PREPARED = Prepared([{"key": "train"}], {"key": "eval"}, asdict(MARK), max_steps=60, num_positions=480)
ENDED = {"type": "WorkerCrashError", "message": "rank 1 died (killed by signal 9)"}


def _config(
    keep_last: int = 2, failure: dict[str, Any] | None = None, evaluation: dict[str, Any] | None = None
) -> Config:
    return Config.model_validate(
        {
            "run": {"name": RUN_ID},
            "model": {"name": "tiny-random", "dtype": "float32"},
            "method": {"kind": "full"},
            "data": {"train": [{"source": "embedded:orders/train"}], "eval": "embedded:orders/eval"},
            "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 60},
            "cluster": {"num_workers": [1, WORLD_SIZE]},
            "checkpoint": {"every_steps": 10, "keep_last": keep_last},
            "failure": failure or {},
            "eval": evaluation or {},
            "monitor": {"wandb": "disabled"},
        }
    )


@dataclass
class RecordingSink:
    """A sink that keeps what it is given."""

    steps: list[int] = field(default_factory=list)
    evals: list[int] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def log_step(self, row: dict[str, Any]) -> None:
        self.steps.append(row["step"])

    def log_eval(self, row: dict[str, Any]) -> None:
        self.evals.append(row["step"])

    def close(self, state: str) -> None:
        self.states.append(state)


@dataclass
class Run:
    """A run directory, the coordinator of this driver, and ranks that say what real ones say."""

    dir: RunPlace
    keep_last: int = 2
    failure: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    sink: RecordingSink = field(default_factory=RecordingSink)

    def __post_init__(self) -> None:
        self.store = LocalStore(self.dir.path)
        self.restart()

    def restart(self) -> None:
        """Another driver's coordinator, which knows the disk only."""
        record = RunRecord(RUN_ID, max_steps=60)
        config = _config(self.keep_last, self.failure, self.evaluation)
        self.coordinator = Coordinator(config, self.dir, record, PREPARED, [self.sink])

    def open(self, world_size: int = WORLD_SIZE, start: bool = True) -> Any:
        self.world_size = world_size
        self.spec = self.coordinator.open_attempt(world_size)
        if start:
            for rank in range(world_size):
                self.send(rank, RankStarted(1000 + rank, "10.0.0.1"))
        return self.spec

    def send(self, rank: int, message: Message, attempt: int | None = None, run_id: str = RUN_ID) -> Reply:
        return self.coordinator.handle(Envelope(run_id, attempt or self.spec.attempt, rank, message))

    def step(self, step: int, loss: float = 1.0) -> Reply:
        return self.send(0, StepDone(self.row(step, loss), []))

    def row(self, step: int, loss: float = 1.0) -> dict[str, Any]:
        return {
            "step": step,
            "attempt": self.spec.attempt,
            "loss": loss,
            "tokens_per_s": 5.0,
            "step_s": 0.2,
            "world_size": 2,
        }

    def stage(
        self, rank: int, step: int, start: int | None = None, end: int | None = None, is_last: bool = False
    ) -> Reply:
        """Writes a rank's slice file, as `train/loop.py` does, and reports it."""
        slices = []
        for param in PARAMS:
            first = param.numel * rank // self.world_size if start is None else start
            last = param.numel * (rank + 1) // self.world_size if end is None else end
            for kind in STATE_KINDS:
                slices.append((SliceKey(param.name, first, kind), torch.full((last - first,), float(step))))
        directory = self.dir.checkpoint(step, self.spec.attempt)
        file = write_slices(LocalStore(directory), slices_name(rank, self.world_size), slices)
        return self.send(rank, Staged(step, asdict(file), self.details(step) if rank == 0 else None, is_last))

    def details(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "cursor": {"epoch": 0, "position": 8 * step},
            "zero_stage": 2,
            "optimizer_step": step,
            "fingerprint": asdict(MARK),
            "params": [param.to_dict() for param in PARAMS],
            "groups": [],
            "schedule": {"kind": "cosine", "max_steps": 60},
            "probe": {"tokens": [1], "columns": [0], "logits": [[0.5]]},
            "environment": {"versions": {}, "num_threads": 1},
        }

    def commit(self, step: int) -> Reply:
        for rank in range(self.world_size):
            reply = self.stage(rank, step)
        return reply

    @property
    def directories(self) -> list[str]:
        return sorted(path.name for path in self.dir.checkpoints.iterdir())

    def events(self, name: str) -> list[dict[str, Any]]:
        return [entry for entry in read_rows(self.dir.ledger) if entry["event"] == name]

    def damage(self, step: int, attempt: int) -> None:
        path = self.dir.checkpoint(step, attempt) / slices_name(0, WORLD_SIZE)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(open_run(tmp_path / "run"))


# The record ----------------------------------------------------------------


def test_a_run_is_on_disk_before_its_first_attempt(run: Run) -> None:
    record = read_json(run.dir.run_json)
    assert (record["run_id"], record["state"], record["attempt"], record["max_steps"]) == (
        RUN_ID,
        "starting",
        0,
        60,
    )
    assert read_attempts(run.store) == []


def test_the_record_says_who_works(run: Run) -> None:
    run.open()
    record = read_json(run.dir.run_json)
    assert record["state"] == "running"
    assert (record["attempt"], record["world_size"], record["step"]) == (1, 2, 0)
    assert record["workers"] == [
        {"rank": 0, "pid": 1000, "node_ip": "10.0.0.1"},
        {"rank": 1, "pid": 1001, "node_ip": "10.0.0.1"},
    ]


def test_a_run_is_starting_until_every_rank_is_there(run: Run) -> None:
    run.open(start=False)
    run.send(1, RankStarted(7, "10.0.0.2"))
    assert read_json(run.dir.run_json)["state"] == "starting"
    run.send(0, RankStarted(6, "10.0.0.1"))
    assert read_json(run.dir.run_json)["state"] == "running"


def test_an_attempt_tells_the_ranks_what_preparation_found(run: Run) -> None:
    spec = run.open()
    assert (spec.run_id, spec.attempt, spec.run_dir) == (RUN_ID, 1, str(run.dir.path))
    assert (spec.splits, spec.eval_split, spec.fingerprint) == (
        PREPARED.splits,
        PREPARED.eval_split,
        PREPARED.fingerprint,
    )
    assert (spec.max_steps, spec.num_positions, spec.start_checkpoint) == (60, 480, None)
    assert Config.model_validate(spec.config) == _config()


def test_every_rank_learns_where_rank_0_listens(run: Run) -> None:
    run.open()
    assert run.send(1, Heartbeat()).rendezvous is None
    run.send(0, RendezvousOpen("10.0.0.1", 4242))
    assert run.send(1, Heartbeat()).rendezvous == ("10.0.0.1", 4242)


# Fencing -------------------------------------------------------------------


@pytest.mark.parametrize(("run_id", "attempt"), [(RUN_ID, 1), (RUN_ID, 3), ("another", 2)])
def test_a_message_of_another_attempt_is_refused_and_changes_nothing(run: Run, run_id: str, attempt: int) -> None:
    run.open()
    run.commit(10)
    run.open()
    before = {path: path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file()}
    for message in (
        StepDone(run.row(11), []),
        RankFailed(ENDED),
        RankDone("completed", 60),
        Staged(20, {}, None),
    ):
        with pytest.raises(StaleAttemptError, match="current attempt"):
            run.send(0, message, attempt, run_id)
    assert before == {path: path.read_bytes() for path in run.dir.path.rglob("*") if path.is_file()}
    assert run.coordinator.outcome() is None


def test_what_an_older_driver_commits_later_does_not_count(run: Run) -> None:
    run.open()
    run.commit(10)
    zombie, zombie_spec = run.coordinator, run.spec
    run.restart()
    run.open()
    current, current_spec = run.coordinator, run.spec
    run.coordinator, run.spec = zombie, zombie_spec
    with suppress(StaleAttemptError):
        run.commit(20)
    run.coordinator, run.spec = current, current_spec
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1)]
    run.commit(20)
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1), (20, 2)]


def test_an_older_driver_stops_writing_the_books_once_a_newer_attempt_exists(run: Run) -> None:
    run.open()
    zombie, zombie_spec = run.coordinator, run.spec
    run.restart()
    run.open()
    run.step(1, loss=2.0)
    run.coordinator, run.spec = zombie, zombie_spec
    run.coordinator.tick(time.monotonic())
    assert run.coordinator.outcome() == "failed"
    with suppress(StaleAttemptError):
        assert run.step(1, loss=3.0).abort is not None
    assert last_rows(run.dir.metrics)[1]["loss"] == 2.0
    assert read_json(run.dir.run_json)["attempt"] == 2


# Rows ----------------------------------------------------------------------


def test_a_row_that_is_sent_twice_is_written_once(run: Run) -> None:
    run.open()
    for step in (1, 1, 2, 2, 1, 3):
        run.step(step)
    assert [row["step"] for row in read_rows(run.dir.metrics)] == [1, 2, 3]
    assert run.sink.steps == [1, 2, 3]
    assert run.coordinator.status()["step"] == 3


def test_replayed_steps_are_written_again_and_the_last_row_counts(run: Run) -> None:
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


def test_an_evaluation_is_written_and_shown(run: Run) -> None:
    run.open()
    run.send(0, EvalDone({"step": 0, "attempt": 1, "eval_loss": 3.5}))
    assert read_rows(run.dir.evals) == [{"step": 0, "attempt": 1, "eval_loss": 3.5}]
    assert run.coordinator.status()["eval"]["eval_loss"] == 3.5
    assert run.sink.evals == [0]


def test_an_attempt_knows_what_was_measured_before_its_start(run: Run) -> None:
    run.open()
    for step, loss in [(0, 9.0), (10, 5.0), (20, 4.0)]:
        run.send(0, EvalDone({"step": step, "attempt": 1, "eval_loss": loss}))
        if step == 10:
            run.commit(step)
    run.restart()  # another driver takes over; what was measured at step 20 is measured again
    assert run.open().evaluations == [
        {"step": 0, "attempt": 1, "eval_loss": 9.0},
        {"step": 10, "attempt": 1, "eval_loss": 5.0},
    ]


STEERED = {"every_steps": 10, "best_metric": "eval_loss", "early_stopping": {"patience": 2}}


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([3.0, 2.0, 1.0, 0.5], [40]), ([1.0, 2.0, 3.0, 4.0], [10, 40]), ([3.0, 2.0, None, 2.0], [20, 40])],
)
def test_the_best_checkpoint_stays_also_under_another_driver(
    tmp_path: Path, losses: list[float | None], kept: list[int]
) -> None:
    run = Run(open_run(tmp_path / "run"), keep_last=1, evaluation=STEERED)
    run.open()
    for index, loss in enumerate(losses):
        if index == 2:
            run.restart()
            run.open()
        step = 10 * (index + 1)
        run.send(0, EvalDone({"step": step, "attempt": run.spec.attempt, "eval_loss": loss}))
        run.commit(step)
    assert [m.step for m in committed(run.store)] == kept
    assert len(run.directories) == len(kept)


def test_a_step_that_was_measured_and_not_saved_is_not_the_best_checkpoint(tmp_path: Path) -> None:
    run = Run(open_run(tmp_path / "run"), keep_last=1, evaluation=STEERED)
    run.open()
    for step, loss in [(10, 3.0), (20, 1.0), (30, 4.0)]:
        run.send(0, EvalDone({"step": step, "attempt": 1, "eval_loss": loss}))
        if step == 20:
            run.send(0, _full(0, step))
        else:
            run.commit(step)
    assert [m.step for m in committed(run.store)] == [10, 30]


@pytest.mark.parametrize(("last_step", "stops"), [(30, [(30, 10, 2)]), (60, [])])
def test_a_run_that_ends_early_says_so(tmp_path: Path, last_step: int, stops: list[tuple[int, int, int]]) -> None:
    run = Run(open_run(tmp_path / "run"), evaluation=STEERED)
    run.open()
    for step, loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        run.send(0, EvalDone({"step": step, "attempt": 1, "eval_loss": loss}))
    for rank in range(WORLD_SIZE):
        run.send(rank, RankDone("completed", last_step))
    assert run.coordinator.outcome() == "completed"
    found = [(row["step"], row["best_step"], row["patience"]) for row in run.events("early_stop")]
    assert found == stops
    assert read_json(run.dir.run_json)["step"] == last_step


def test_a_last_checkpoint_that_cannot_be_committed_ends_the_run(run: Run) -> None:
    run.open()
    run.stage(0, 30, is_last=True)
    (run.dir.checkpoint(30, 1) / slices_name(0, 2)).unlink()
    assert run.stage(1, 30, is_last=True).abort is not None  # else the ranks would wait for it
    assert run.coordinator.status()["failures"][0]["type"] == "StorageError"


def test_what_the_driver_finds_goes_into_the_ledger(run: Run) -> None:
    run.coordinator.add_event("settings_changed", changes=["train.micro_batch_size: 1 → 2"])
    assert run.events("settings_changed")[0]["changes"] == ["train.micro_batch_size: 1 → 2"]


# Commits -------------------------------------------------------------------


def test_a_checkpoint_exists_once_all_ranks_have_staged_it(run: Run) -> None:
    run.open()
    assert run.stage(0, 10).committed_step == 0
    assert committed(run.store) == []
    assert run.stage(1, 10).committed_step == 10
    (manifest,) = committed(run.store)
    assert (manifest.run_id, manifest.step, manifest.attempt, manifest.world_size) == (RUN_ID, 10, 1, 2)
    assert (manifest.cursor.position, manifest.fingerprint, manifest.params) == (80, MARK, PARAMS)
    assert [file.name for file in manifest.files] == [slices_name(0, 2), slices_name(1, 2)]
    verify_files(run.store, manifest)
    assert run.send(0, Heartbeat()).committed_step == 10
    assert [(entry["step"], entry["attempt"]) for entry in run.events("commit")] == [(10, 1)]


def test_ranks_may_stage_in_any_order_and_steps_may_overlap(run: Run) -> None:
    run.open(world_size=3)
    for rank, step in [(2, 10), (0, 20), (1, 10), (2, 20), (0, 10), (1, 20)]:
        run.stage(rank, step)
    assert [m.step for m in committed(run.store)] == [10, 20]


@pytest.mark.parametrize(
    ("start", "end", "message"), [(2, 3, "missing"), (0, 3, "stored twice"), (1, 4, "elements stored of")]
)
def test_elements_missing_or_doubled_end_the_attempt_without_a_checkpoint(
    run: Run, start: int, end: int, message: str
) -> None:
    run.open()
    run.stage(0, 10, 0, 1)
    for reply in (run.stage(1, 10, start, end), run.send(0, Heartbeat())):
        assert reply.abort is not None
        assert reply.committed_step == 0
    assert committed(run.store) == []
    assert not (run.dir.checkpoint(10, 1) / "manifest.json").exists()
    assert run.coordinator.outcome() == "failed"
    (failure,) = run.coordinator.status()["failures"]
    assert failure["type"] == "CheckpointError"
    assert run.events("rank_failed")[0]["message"] == failure["message"]


def test_a_gap_is_named(run: Run) -> None:
    run.open()
    run.stage(0, 10, 0, 1)
    run.stage(1, 10, 2, 3)
    assert "elements 1..1 are missing" in run.coordinator.status()["failures"][0]["message"]


def test_a_file_of_another_kind_ends_the_attempt(run: Run) -> None:
    run.open()
    run.stage(0, 10)
    path = run.dir.checkpoint(10, 1) / slices_name(0, 2)
    path.write_bytes(b"not a tensor file")
    assert run.stage(1, 10).abort is not None
    assert committed(run.store) == []


def test_a_staged_file_that_cannot_be_seen_makes_no_checkpoint_and_ends_nothing(run: Run) -> None:
    run.open()
    run.stage(0, 10)
    (run.dir.checkpoint(10, 1) / slices_name(0, 2)).unlink()
    assert run.stage(1, 10).abort is None
    assert [entry["step"] for entry in run.events("save_failed")] == [10]
    run.commit(20)
    assert [m.step for m in committed(run.store)] == [20]


def _full(rank: int, step: int, is_last: bool = False) -> SaveFailed:
    return SaveFailed(step, "OSError: [Errno 28] No space left on device", is_last)


def test_a_save_that_fails_is_left_out_on_all_ranks(run: Run) -> None:
    run.open()
    run.stage(0, 10)
    run.send(1, _full(1, 10))
    run.send(0, _full(0, 10))
    assert [entry["step"] for entry in run.events("save_failed")] == [10]
    run.commit(20)
    assert [m.step for m in committed(run.store)] == [20]
    assert run.coordinator.outcome() is None


@pytest.mark.parametrize(("steps", "is_last"), [((10, 20, 30), False), ((10,), True)])
def test_saves_that_keep_failing_end_the_run(run: Run, steps: tuple[int, ...], is_last: bool) -> None:
    run.open()
    for step in steps:
        assert run.coordinator.outcome() is None
        run.send(0, _full(0, step, is_last))
    assert run.send(1, Heartbeat()).abort is not None
    (failure,) = run.coordinator.status()["failures"]
    assert failure["type"] == "StorageError"
    assert "No space left" in failure["message"]
    assert not run.coordinator.decide("", [], time.monotonic()).is_restart


def test_a_save_that_succeeds_forgets_those_that_failed(run: Run) -> None:
    run.open()
    for step in (10, 20):
        run.send(0, _full(0, step))
    run.commit(30)
    for step in (40, 50):
        run.send(0, _full(0, step))
    assert run.coordinator.outcome() is None


# Other sizes ---------------------------------------------------------------


def _drained(run: Run) -> None:
    """The node of rank 1 gives notice behind step 5; the ranks save and end."""
    run.open()
    run.step(5)
    assert run.coordinator.choose_size(ClusterView(1, ("10.0.0.9",)), 100.0) is None
    assert [run.send(rank, Heartbeat()).stop for rank in range(2)] == [True, True]
    run.commit(6)


def test_a_group_that_leaves_a_machine_saves_first_and_keeps_its_places(run: Run) -> None:
    _drained(run)
    assert run.send(0, RankDone("stopped", 6)).hold
    assert run.coordinator.choose_size(ClusterView(1, ("10.0.0.9",)), 101.0) is None  # rank 1 is not there yet
    assert run.send(1, RankDone("stopped", 6)).hold
    assert run.coordinator.outcome() is None
    assert run.coordinator.choose_size(ClusterView(2), 102.0) == 2
    assert run.coordinator.choose_size(ClusterView(2), 103.0) == 2  # the answer may have been lost
    assert run.coordinator.choose_size(ClusterView(2, formed_at=7.0), 104.0) is None  # formed anew, not yet opened
    spec = run.open(world_size=2)
    assert spec.start_checkpoint == "checkpoints/step-00000006-a0001/manifest.json"
    assert not run.send(0, Heartbeat()).stop
    assert [entry["step"] for entry in run.events("resizing")] == [5]
    assert not run.events("recovering")


def test_a_group_that_loses_its_machine_after_it_was_drained_has_not_failed(run: Run) -> None:
    _drained(run)
    for rank in range(2):
        run.send(rank, RankDone("stopped", 6))
    assert run.coordinator.decide("worker died", ["10.0.0.9"], 103.0).is_restart
    assert not run.events("recovering")


def test_a_stop_during_a_drain_is_a_stop(run: Run) -> None:
    _drained(run)
    run.coordinator.request_stop("SIGTERM")
    for rank in range(2):
        assert not run.send(rank, RankDone("stopped", 6)).hold
    assert run.coordinator.outcome() == "stopped"


def test_a_rank_that_is_told_to_end_takes_the_group_along_behind_a_checkpoint(run: Run) -> None:
    run.open()
    run.step(5)
    assert run.send(1, Leaving("SIGTERM")).stop
    assert "rank 1 was told to end (SIGTERM)" in run.events("resizing")[0]["reason"]
    assert read_json(run.dir.run_json)["state"] == "resizing"


# Bad numbers ---------------------------------------------------------------


def test_a_step_that_is_left_out_stays_left_out(tmp_path: Path) -> None:
    run = Run(open_run(tmp_path / "run"), failure={"bad_numbers": "skip_batch"})
    run.open()
    run.send(1, RankFailed({"type": "DivergedError", "message": "loss nan"}, step=8))
    assert run.coordinator.decide("", [], 100.0).skip_step == 8
    assert run.open().skipped_steps == [8]
    run.restart()
    assert run.open().skipped_steps == [8]


def test_what_follows_a_failure_is_said_once_and_alike(run: Run) -> None:
    run.open()
    run.step(3)
    first = run.coordinator.decide("worker died", [], 100.0)
    assert run.coordinator.decide("another worker died", [], 101.0) == first
    assert len(run.events("recovering")) == 1
    assert run.events("recovering")[0]["cause"]["type"] == "WorkerCrashError"


def test_a_lost_machine_is_the_cause_whatever_its_peers_say(run: Run) -> None:
    run.open()
    run.send(0, RankFailed({"type": "WorkerCrashError", "message": "connection closed by peer"}))
    run.coordinator.decide("worker died", ["10.0.0.9"], 100.0)
    assert run.events("recovering")[0]["cause"]["type"] == "NodeLostError"


def test_a_checkpoint_is_never_replaced(run: Run) -> None:
    run.open()
    run.commit(10)
    manifest = (run.dir.checkpoint(10, 1) / "manifest.json").read_bytes()
    assert run.commit(10).abort is not None
    assert (run.dir.checkpoint(10, 1) / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_checkpoints_are_kept(tmp_path: Path, keep_last: int) -> None:
    run = Run(open_run(tmp_path / "run"), keep_last)
    run.open()
    for step in (10, 20, 30, 40):
        run.commit(step)
    kept = [10, 20, 30, 40][-keep_last:]
    assert [m.step for m in committed(run.store)] == kept
    assert run.directories == [f"step-{step:08d}-a0001" for step in kept]


def test_retention_goes_on_over_attempts(run: Run) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.open()
    run.commit(30)
    assert run.directories == ["step-00000020-a0001", "step-00000030-a0002"]


def test_a_clean_up_that_fails_does_not_disturb_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.open()
    run.commit(10)
    run.commit(20)

    def busy(*args: Any) -> None:
        raise OSError(16, "Device or resource busy")  # NFS, a file still open elsewhere

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", busy)
        assert run.commit(30).committed_step == 30
    assert run.coordinator.outcome() is None


def test_what_a_dead_attempt_left_half_written_goes_too(run: Run) -> None:
    run.open()
    run.commit(10)
    run.stage(0, 20)  # and then the machine died
    run.open()
    for step in (20, 30, 40):
        run.commit(step)
    assert run.directories == ["step-00000030-a0002", "step-00000040-a0002"]


def test_what_killed_ranks_were_writing_goes_too(run: Run) -> None:
    run.open()
    run.commit(10)
    folder = run.dir.checkpoint(20, 1)
    folder.mkdir()
    (folder / ".slices-00000-of-00002.safetensors.0a1b2c3d").write_bytes(bytes(1000))
    run.open()
    run.commit(20)
    run.commit(30)
    assert run.directories == ["step-00000020-a0002", "step-00000030-a0002"]


def test_what_a_newer_attempt_is_writing_stays(run: Run) -> None:
    run.open()
    run.commit(10)
    # A newer driver has begun between the look for it and the clean-up.
    newer = run.dir.checkpoint(20, 2) / slices_name(0, 2)
    newer.parent.mkdir()
    newer.write_bytes(b"staged")
    run.commit(20)
    assert newer.exists()


def test_a_checkpoint_that_no_longer_counts_goes_too(run: Run) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.damage(20, 1)
    run.open()
    for step in (20, 30, 40):
        run.commit(step)
    assert run.directories == ["step-00000030-a0002", "step-00000040-a0002"]


# Stopping ------------------------------------------------------------------


def test_a_stop_request_file_reaches_every_rank(run: Run) -> None:
    run.open()
    run.step(1)
    run.dir.stop_request.write_text("{}")
    assert not run.send(0, Heartbeat()).stop
    for _ in range(3):
        run.coordinator.tick(time.monotonic())
    assert [run.send(rank, Heartbeat()).stop for rank in range(2)] == [True, True]
    assert read_json(run.dir.run_json)["state"] == "stopping"
    assert len(run.events("stop_requested")) == 1


def test_a_stop_before_the_ranks_are_there_is_not_forgotten(run: Run) -> None:
    run.open(start=False)
    run.coordinator.request_stop("SIGTERM")
    for rank in range(2):
        assert run.send(rank, RankStarted(1, "10.0.0.1")).stop
    assert read_json(run.dir.run_json)["state"] == "stopping"
    assert run.events("stop_requested")[0]["reason"] == "SIGTERM"


def test_a_stop_after_the_end_is_too_late(run: Run) -> None:
    run.open()
    run.coordinator.finish("completed", {})
    run.coordinator.request_stop("SIGTERM")
    assert read_json(run.dir.run_json)["state"] == "completed"


# A further attempt ---------------------------------------------------------


@pytest.fixture(params=["same coordinator", "new coordinator"])
def again(request: pytest.FixtureRequest) -> Callable[[Run], Any]:
    def reopen(run: Run) -> Any:
        if request.param == "new coordinator":
            run.restart()
        return run.open()

    return reopen


def test_a_further_attempt_starts_from_the_newest_checkpoint(run: Run, again: Callable[[Run], Any]) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.step(27)
    spec = again(run)
    assert spec.attempt == 2
    assert spec.start_checkpoint == "checkpoints/step-00000020-a0001/manifest.json"
    assert Manifest.decode(run.store.read(spec.start_checkpoint)).step == 20
    assert [(a.number, a.start_step, a.start_attempt) for a in read_attempts(run.store)] == [
        (1, 0, 0),
        (2, 20, 1),
    ]
    assert read_json(run.dir.run_json)["step"] == 20
    assert run.send(0, Heartbeat()) == Reply()
    assert run.coordinator.outcome() is None


def test_a_further_attempt_without_a_checkpoint_starts_anew(run: Run, again: Callable[[Run], Any]) -> None:
    run.open()
    run.stage(0, 10)
    spec = again(run)
    assert (spec.attempt, spec.start_checkpoint) == (2, None)
    # What the dead attempt had staged does not complete a checkpoint of the new one.
    run.stage(1, 10)
    assert committed(run.store) == []


def test_a_damaged_checkpoint_is_passed_over_loudly(run: Run, again: Callable[[Run], Any]) -> None:
    run.open()
    run.commit(10)
    run.commit(20)
    run.damage(20, 1)
    spec = again(run)
    assert spec.start_checkpoint == "checkpoints/step-00000010-a0001/manifest.json"
    (entry,) = run.events("checkpoint_damaged")
    assert entry["step"] == 20
    assert slices_name(0, 2) in entry["error"]
    run.commit(20)
    assert [(m.step, m.attempt) for m in committed(run.store)] == [(10, 1), (20, 2)]


def test_with_all_checkpoints_damaged_nothing_starts(run: Run, again: Callable[[Run], Any]) -> None:
    run.open()
    for step in (10, 20):
        run.commit(step)
        run.damage(step, 1)
    with pytest.raises(CheckpointError, match="no checkpoint of this run is whole"):
        again(run)
    assert len(read_attempts(run.store)) == 1
    assert len(run.events("checkpoint_damaged")) == 2


@pytest.mark.parametrize("data", [b"", b"{", b'{"format_version": 2}'])
def test_with_all_manifests_unreadable_nothing_starts(run: Run, again: Callable[[Run], Any], data: bytes) -> None:
    run.open()
    run.commit(10)
    (run.dir.checkpoint(10, 1) / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        again(run)


# The end -------------------------------------------------------------------


def test_a_failed_rank_fails_the_attempt(run: Run) -> None:
    run.open()
    run.step(3)
    run.send(0, RankDone("completed", 60))
    run.send(1, RankFailed(ENDED))
    assert run.coordinator.outcome() == "failed"
    (failure,) = run.coordinator.status()["failures"]
    assert (failure["rank"], failure["type"], failure["message"]) == (1, ENDED["type"], ENDED["message"])
    assert run.events("rank_failed")[0]["rank"] == 1


@pytest.mark.parametrize("outcome", ["completed", "stopped"])
def test_the_group_has_ended_once_all_ranks_have(run: Run, outcome: Outcome) -> None:
    run.open()
    run.send(1, RankDone(outcome, 60))
    assert run.coordinator.outcome() is None
    run.send(0, RankDone(outcome, 60))
    assert run.coordinator.outcome() == outcome
    assert run.coordinator.status()["step"] == 60


@pytest.mark.parametrize(
    ("stop", "state", "error"),
    [(False, "completed", None), (True, "stopped", None), (False, "failed", ENDED)],
)
def test_the_end_is_on_disk(run: Run, stop: bool, state: str, error: dict[str, str] | None) -> None:
    run.open()
    run.step(1)
    if stop:
        run.dir.stop_request.write_text("{}")
        run.coordinator.tick(time.monotonic())
    run.coordinator.finish(state, {"final_loss": 1.0}, error)
    record = read_json(run.dir.run_json)
    assert (record["state"], record["result"], record["error"]) == (state, {"final_loss": 1.0}, error)
    assert (record["workers"], record["step"]) == ([], 1)
    assert not run.dir.stop_request.exists()
    assert run.sink.states == [state]
    assert [entry["step"] for entry in run.events(state)] == [1]


def test_an_end_that_cannot_follow_is_refused(run: Run) -> None:
    run.open()
    with pytest.raises(ValueError, match="from running to stopped"):
        run.coordinator.finish("stopped", {})
    assert read_json(run.dir.run_json)["state"] == "running"


# Watching ------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The coordinator's monotonic clock, set by hand."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: fake.now, time=time.time))
    return fake


def test_a_rank_without_progress_is_looked_at_and_named_and_all_are_ended(run: Run, clock: SimpleNamespace) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("step", 1))
    run.send(0, PhaseChanged("save", 10))
    clock.now += 1801
    run.coordinator.tick(clock.now)
    reply = run.send(0, Heartbeat())
    assert (reply.dump, reply.abort) == (True, None)
    run.send(1, Located("works"))
    run.coordinator.tick(clock.now)
    reply = run.send(0, Heartbeat())
    assert reply.abort is not None
    assert "rank 1 makes no progress in phase step after step 1" in reply.abort
    (failure,) = run.coordinator.status()["failures"]
    assert (failure["rank"], failure["type"]) == (1, "StalledError")
    run.coordinator.tick(clock.now + 1)
    assert len(run.coordinator.status()["failures"]) == 1


def _all_in_step(run: Run, clock: SimpleNamespace) -> None:
    """Both ranks are in the same step for too long."""
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("step", 1))
    clock.now += 1801
    run.coordinator.tick(clock.now)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({0: "waits", 1: "stopped"}, "rank 1 makes no progress in phase step after step 1, for 1801 s (stopped)"),
        ({0: "waits", 1: "works"}, "rank 1 makes"),
        ({0: "waits", 1: "waits"}, "ranks 0, 1 make"),
    ],
)
def test_of_ranks_in_the_same_step_the_one_that_does_not_wait_is_named(
    said: dict[int, Whereabouts], named: str, run: Run, clock: SimpleNamespace
) -> None:
    _all_in_step(run, clock)
    for rank, state in said.items():
        run.send(rank, Located(state))
    run.coordinator.tick(clock.now)
    abort = run.send(0, Heartbeat()).abort
    assert abort is not None
    assert named in abort


def test_a_supervisor_that_does_not_say_where_its_rank_is_is_named_after_two_seconds(
    run: Run, clock: SimpleNamespace
) -> None:
    _all_in_step(run, clock)
    run.send(0, Located("works"))
    run.coordinator.tick(clock.now + 1.9)
    assert run.send(0, Heartbeat()).abort is None
    run.coordinator.tick(clock.now + 2.1)
    abort = run.send(0, Heartbeat()).abort
    assert abort is not None
    assert "rank 1 makes no progress" in abort
    assert "(its worker does not answer)" in abort


def test_a_step_that_ends_while_ranks_are_looked_for_is_progress(run: Run, clock: SimpleNamespace) -> None:
    _all_in_step(run, clock)
    run.step(2)
    run.coordinator.tick(clock.now + 1)
    reply = run.send(0, Heartbeat())
    assert (reply.dump, reply.abort) == (False, None)


def test_ranks_that_have_ended_are_not_waited_for(run: Run, clock: SimpleNamespace) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, RankDone("completed", 60))
    clock.now += 1e6
    run.coordinator.tick(clock.now)
    assert run.coordinator.outcome() == "completed"


def test_steps_without_a_save_for_an_hour_are_progress_of_all_ranks(run: Run, clock: SimpleNamespace) -> None:
    run.open()
    for rank in range(2):
        run.send(rank, PhaseChanged("first_step", 0))
        run.send(rank, PhaseChanged("step", 1))
    for step in range(1, 61):
        clock.now += 60
        run.step(step)
        run.send(1, Heartbeat())
        run.coordinator.tick(clock.now)
    assert run.coordinator.outcome() is None


def _one_has_saved(run: Run) -> None:
    """Both ranks come to the save of step 10; rank 0 is through and waits in the next step, rank 1 is not."""
    run.open()
    for phase, step in [("first_step", 0), ("step", 1), ("save", 10)]:
        for rank in range(2):
            run.send(rank, PhaseChanged(phase, step))
    run.send(0, PhaseChanged("step", 10))


def test_a_rank_that_has_saved_is_not_blamed_for_one_that_has_not(run: Run, clock: SimpleNamespace) -> None:
    _one_has_saved(run)
    clock.now += 10_000
    run.coordinator.tick(clock.now)
    run.send(1, Located("works"))
    run.coordinator.tick(clock.now)
    assert [failure["rank"] for failure in run.coordinator.status()["failures"]] == [1]


def test_a_slow_save_within_its_limit_does_not_end_the_run(run: Run, clock: SimpleNamespace) -> None:
    _one_has_saved(run)
    clock.now += 500
    run.coordinator.tick(clock.now)
    assert run.coordinator.outcome() is None


def test_a_status_is_plain_data(run: Run) -> None:
    run.open()
    run.step(1)
    run.commit(10)
    status = run.coordinator.status()
    assert json.loads(json.dumps(status)) == status
    assert status["phases"] == ["load"]


def _work_for(run: Run, clock: SimpleNamespace, seconds: int, speaking: tuple[int, ...]) -> None:
    for _ in range(seconds):
        clock.now += 1
        for rank in speaking:
            run.send(rank, Heartbeat())
        run.coordinator.tick(clock.now)


def test_a_worker_of_which_nothing_is_heard_is_named(run: Run, clock: SimpleNamespace) -> None:
    run.open()
    _work_for(run, clock, 59, speaking=(0,))
    assert run.coordinator.outcome() is None
    _work_for(run, clock, 3, speaking=(0,))
    (failure,) = run.coordinator.status()["failures"]
    assert (failure["rank"], failure["type"]) == (1, "StalledError")
    assert "nothing was heard of the workers of ranks [1]" in failure["message"]


def test_a_coordinator_that_was_held_up_itself_blames_nobody(run: Run, clock: SimpleNamespace) -> None:
    run.open()
    _work_for(run, clock, 30, speaking=(0, 1))
    clock.now += 300  # it read a large checkpoint; what the workers said meanwhile waits behind this look
    run.coordinator.tick(clock.now)
    _work_for(run, clock, 30, speaking=(0, 1))
    assert run.coordinator.outcome() is None
