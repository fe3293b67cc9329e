"""Two drivers on one run directory: one wins, the other ends with a clear error and writes nothing that is read.

A *zombie* is the driver (or coordinator) of an attempt that a newer one has superseded.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ft.checkpoint.lineage import Attempt, committed, follow, newest_number, read_attempts, take_attempt
from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.checkpoint.tensorfile import write_tensors
from dist_ft.config import Config, dump_yaml
from dist_ft.coordinator import core
from dist_ft.coordinator.core import Coordinator
from dist_ft.data.shards.counts import Counts
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.errors import CheckpointError, StaleAttemptError, UsageError
from dist_ft.layout import slices_name
from dist_ft.messages import (
    Envelope,
    EvalDone,
    Heartbeat,
    Loaded,
    Message,
    PhaseChanged,
    RankDone,
    RankFailed,
    RankStarted,
    RendezvousOpen,
    Reply,
    Staged,
    StepDone,
)
from dist_ft.metric_rows import EvalRow
from dist_ft.run.attempt_spec import AttemptSpec
from dist_ft.run.place import Run, open_run
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey, WrittenFile
from dist_ft.storage.publish import read_json
from dist_ft.storage.store import LocalStore
from tests.helpers.cluster import is_alive
from tests.helpers.configs import tiny_config
from tests.helpers.group import Group, run_group
from tests.helpers.manifests import MARK, make_manifest, saved_state
from tests.helpers.rows import last_rows, read_rows, step_row

PARAMS = (ParamInfo("w", (4, 5), "w"),)
SPLIT = PreparedSplit("/cache", "train", 1, Counts(), {}, max_tokens=8, max_trained_tokens=7)
INPUTS = RunInputs((SPLIT,), replace(SPLIT, key="eval"), MARK, max_steps=60, num_positions=480)
LOST = {"type": "WorkerCrashError", "message": "rank 0 died (killed by signal 9)"}

# One driver's coordinator, with ranks that say what real ones say ------------


@dataclass
class Driver:
    """A coordinator on a run directory that it may share with others."""

    dir: Run
    keep_last: int = 10

    def __post_init__(self) -> None:
        self.store = LocalStore(self.dir.path)
        config = tiny_config_of(self.dir, self.keep_last)
        known = read_json(self.dir.run_json)["attempt"] if self.dir.run_json.exists() else 0
        record = RunRecord(config.run.name, attempt=known, max_steps=60)
        self.coordinator = Coordinator(config, self.dir, record, INPUTS)

    def open(self) -> AttemptSpec:
        """Opens an attempt of one rank, which starts."""
        self.spec = self.coordinator.open_attempt(1, time.monotonic())
        self.send(RankStarted(1000 + self.spec.attempt, "10.0.0.1"))
        return self.spec

    def send(self, message: Message) -> Reply:
        return self.coordinator.handle(Envelope(self.spec.run_id, self.spec.attempt, 0, message), time.monotonic())

    def step(self, step: int) -> Reply:
        return self.send(StepDone(step_row(step, self.spec.attempt, loss=float(self.spec.attempt)), []))

    def write(self, step: int) -> Staged:
        """Writes the rank's slices into the attempt's own folder; returns what the rank then says."""
        layout = [(SliceKey(p.name, 0, kind).encode(), "F32", (p.numel,)) for p in PARAMS for kind in STATE_KINDS]
        data = [np.full(p.numel, step, "<f4").tobytes() for p in PARAMS for _ in STATE_KINDS]
        file = write_tensors(LocalStore(self.dir.checkpoint(step, self.spec.attempt)), slices_name(0, 1), layout, data)
        return Staged(step, file, saved_state(step, PARAMS))

    def commit(self, step: int) -> Reply:
        return self.send(self.write(step))

    def contents(self) -> dict[str, bytes]:
        """Everything in the run directory."""
        files = (path for path in self.dir.path.rglob("*") if path.is_file())
        return {path.relative_to(self.dir.path).as_posix(): path.read_bytes() for path in files}

    @property
    def checkpoints(self) -> list[tuple[int, int]]:
        """(step, attempt) of what readers see."""
        return [(m.step, m.attempt) for m in committed(self.store)]


def tiny_config_of(run_dir: Run, keep_last: int) -> Config:
    return tiny_config(
        run_dir.path.parent, run__name=run_dir.path.name, run__output_dir=str(run_dir.path.parent),
        checkpoint__keep_last=keep_last,
    )  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Run:
    return open_run(tmp_path / "t")


@dataclass
class Pair:
    """Attempt 1 came to step 4 with checkpoints 2 and 4; attempt 2 took over from step 4."""

    zombie: Driver
    newer: Driver


@pytest.fixture
def pair(run_dir: Run) -> Pair:
    zombie = Driver(run_dir)
    zombie.open()
    for step in (1, 2, 3, 4):
        zombie.step(step)
        if step in (2, 4):
            zombie.commit(step)
    newer = Driver(run_dir)
    assert newer.open().start_checkpoint == f"checkpoints/step-00000004-a0001/{MANIFEST}"
    newer.step(5)
    return Pair(zombie, newer)


# The race for an attempt ----------------------------------------------------


def race(pool: ThreadPoolExecutor, drivers: list[Driver]) -> tuple[list[Driver], list[UsageError]]:
    """All open an attempt at the same moment; returns those that got one, by its number, and the others' errors."""
    barrier = threading.Barrier(len(drivers))

    def take(driver: Driver) -> UsageError | None:
        barrier.wait(10)
        try:
            driver.spec = driver.coordinator.open_attempt(1, time.monotonic())
            return None
        except UsageError as error:
            return error

    errors = list(pool.map(take, drivers))
    winners = [driver for driver, error in zip(drivers, errors, strict=True) if error is None]
    return sorted(winners, key=lambda d: d.spec.attempt), [error for error in errors if error is not None]


def test_of_two_drivers_at_the_same_moment_one_wins_each_number(run_dir: Run) -> None:
    outcomes: set[int] = set()
    taken: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            winners, refused = race(pool, [Driver(run_dir), Driver(run_dir)])
            outcomes.add(len(winners))
            taken += [d.spec.attempt for d in winners]
            for error in refused:
                assert f"another driver has just taken attempt {taken[-1]} of this run" in str(error)
            newest = winners[-1]
            for older in winners[:-1]:
                for message in (
                    StepDone(step_row(1, older.spec.attempt, loss=9.0), []),
                    older.write(1),
                ):
                    with pytest.raises(StaleAttemptError, match=f"attempt {newest.spec.attempt} of this run"):
                        older.send(message)
                older.coordinator.finish("failed", {})
            newest.send(RankStarted(newest.spec.attempt, "10.0.0.1"))
            newest.step(1)
            record = read_json(run_dir.run_json)
            assert (record["attempt"], record["state"]) == (newest.spec.attempt, "running")
            assert [row["attempt"] for row in read_rows(run_dir.metrics)][-1] == newest.spec.attempt
            newest.coordinator.finish("completed", {})
    assert taken == sorted(set(taken)) == list(range(1, len(taken) + 1))
    assert [a.number for a in read_attempts(LocalStore(run_dir.path))] == taken
    assert outcomes <= {1, 2}
    # Every line of the ledger is whole, and every attempt is in it once, whoever wrote it.
    lines = [json.loads(line) for line in run_dir.ledger.read_text().splitlines()]
    assert sorted(entry["attempt"] for entry in lines if entry["event"] == "attempt") == taken
    assert {row["attempt"] for row in read_rows(run_dir.metrics)} <= set(taken)
    assert committed(LocalStore(run_dir.path)) == []


def lose_the_race(run_dir: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[Driver, Driver]:
    """Returns (winner, loser): the loser looked for the next number before the winner took it."""
    winner, loser = Driver(run_dir), Driver(run_dir)
    number = newest_number(loser.store)
    winner.open()
    with monkeypatch.context() as patch:
        patch.setattr("dist_ft.checkpoint.lineage.newest_number", lambda store: number)
        with pytest.raises(UsageError, match="another driver has just taken attempt 1"):
            loser.coordinator.open_attempt(1, time.monotonic())
    return winner, loser


def test_the_loser_of_the_race_changes_nothing_on_disk(run_dir: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    winner, _ = lose_the_race(run_dir, monkeypatch)
    record = read_json(run_dir.run_json)
    assert (record["state"], record["attempt"], record["workers"][0]["pid"]) == ("running", 1, 1001)
    assert [a.number for a in read_attempts(winner.store)] == [1]
    assert winner.step(1).abort is None


def test_the_loser_of_the_race_leaves_the_winners_record_alone_when_it_ends(
    run_dir: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, loser = lose_the_race(run_dir, monkeypatch)
    before = run_dir.run_json.read_bytes()
    loser.coordinator.finish("failed", {}, {"type": "UsageError", "message": "another driver has just taken it"})
    assert run_dir.run_json.read_bytes() == before
    assert winner.step(1).abort is None


def test_a_driver_that_never_got_workers_leaves_a_completed_record_alone(run_dir: Run) -> None:
    # It began while the other one ran, waited for workers in vain, and gives up after the other has completed.
    winner = Driver(run_dir)
    winner.open()
    waiting = Driver(run_dir)
    winner.step(1)
    winner.coordinator.finish("completed", {"final_loss": 1.0})
    waiting.coordinator.finish("failed", {}, {"type": "StartTimeoutError", "message": "they did not start"})
    record = read_json(run_dir.run_json)
    assert (record["state"], record["attempt"], record["error"]) == ("completed", 1, None)
    assert record["result"] == {"final_loss": 1.0}


def test_a_driver_without_an_attempt_does_not_replace_the_record_of_the_running_one(run_dir: Run) -> None:
    Driver(run_dir).open()
    before = run_dir.run_json.read_bytes()
    Driver(run_dir)
    assert run_dir.run_json.read_bytes() == before


def test_the_checkpoint_an_attempt_starts_from_survives_the_moment_of_the_takeover(
    run_dir: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Driver(run_dir, keep_last=1)
    running.open()
    running.commit(2)
    newer = Driver(run_dir, keep_last=1)
    is_first = True

    def commit_first(*args: Any) -> Attempt:
        nonlocal is_first
        if is_first:
            is_first = False
            running.commit(4)
        return take_attempt(*args)

    monkeypatch.setattr(core, "take_attempt", commit_first)
    spec = newer.open()
    assert newer.checkpoints, "no checkpoint of the run counts any more"
    assert spec.start_checkpoint == f"{committed(newer.store)[-1].directory}/{MANIFEST}"


def test_a_run_whose_start_is_gone_does_not_silently_start_anew(pair: Pair) -> None:
    pair.newer.store.delete("checkpoints")
    with pytest.raises(CheckpointError, match="step 4"):
        Driver(pair.newer.dir).open()


# What a zombie still says ---------------------------------------------------

ROW = step_row(5, loss=-1.0)
SAID: dict[str, Message] = {
    "step_done": StepDone(ROW, []),
    "staged": Staged(6, WrittenFile(slices_name(0, 1), 0, ""), None),
    "eval_done": EvalDone(EvalRow(4, 1, {"eval_loss": -1.0})),
    "rank_started": RankStarted(77, "10.0.0.9"),
    "rendezvous_open": RendezvousOpen("10.0.0.9", 1),
    "phase_changed": PhaseChanged("save", 6),
    "loaded": Loaded(6, 0, []),
    "rank_done": RankDone("completed", 60),
    "rank_failed": RankFailed(LOST),
}


@pytest.mark.parametrize("kind", ["step_done", "staged"])
def test_steps_and_staged_files_of_a_zombie_are_refused(kind: str, pair: Pair) -> None:
    before = pair.zombie.contents()
    for _ in range(2):
        with pytest.raises(StaleAttemptError, match="attempt 2 of this run has begun elsewhere"):
            pair.zombie.send(pair.zombie.write(6) if kind == "staged" else SAID[kind])
    after = pair.zombie.contents()
    after.pop(f"checkpoints/step-00000006-a0001/{slices_name(0, 1)}", None)  # the rank's own folder, without manifest
    assert after == before
    assert last_rows(pair.zombie.dir.metrics)[5]["attempt"] == 2
    assert pair.zombie.coordinator.outcome() == "failed"
    (failure,) = pair.zombie.coordinator.status().failures
    assert failure.type == "StaleAttemptError"
    assert "attempt 1 writes nothing more" in failure.message


@pytest.mark.parametrize(
    "kind",
    [
        "eval_done",
        "rank_started",
        "rendezvous_open",
        "phase_changed",
        "loaded",
        "rank_done",
        "rank_failed",
    ],
)
def test_a_zombie_that_has_not_looked_yet_writes_nothing(kind: str, pair: Pair) -> None:
    before = pair.zombie.contents()
    with contextlib.suppress(StaleAttemptError):
        pair.zombie.send(SAID[kind])
    assert pair.zombie.contents() == before


@pytest.mark.parametrize(
    "kind",
    [
        "eval_done",
        "rank_started",
        "rendezvous_open",
        "phase_changed",
        "loaded",
        "rank_done",
        "rank_failed",
    ],
)
def test_a_zombie_that_knows_writes_nothing(kind: str, pair: Pair) -> None:
    pair.zombie.coordinator.tick(time.monotonic())
    before = pair.zombie.contents()
    with contextlib.suppress(StaleAttemptError):
        pair.zombie.send(SAID[kind])
    assert pair.zombie.contents() == before


def test_an_overtaken_driver_does_not_fight_back(pair: Pair) -> None:
    pair.zombie.send(SAID["rank_failed"])
    decision = pair.zombie.coordinator.decide("a worker was lost", [], time.monotonic())
    assert not decision.is_restart
    with pytest.raises(StaleAttemptError, match="attempt 2 of this run has begun elsewhere"):
        pair.zombie.coordinator.open_attempt(1, time.monotonic())
    assert [attempt.number for attempt in read_attempts(pair.newer.store)] == [1, 2]


def test_a_look_tells_all_ranks_of_a_zombie_to_end(pair: Pair) -> None:
    pair.zombie.coordinator.tick(time.monotonic())
    reply = pair.zombie.send(Heartbeat())
    assert reply.abort is not None
    assert "attempt 2 of this run has begun elsewhere" in reply.abort
    pair.newer.coordinator.tick(time.monotonic())
    assert pair.newer.send(Heartbeat()).abort is None


@pytest.mark.parametrize(
    "has_looked",
    [
        True,
        False,
    ],
    ids=["it has looked", "it has not looked"],
)
@pytest.mark.parametrize("state", ["completed", "failed"])
def test_the_end_of_a_zombie_leaves_the_record_alone(state: str, has_looked: bool, pair: Pair) -> None:
    if has_looked:
        pair.zombie.coordinator.tick(time.monotonic())
    pair.newer.dir.stop_request.write_text("{}")  # meant for the newer one
    before = pair.zombie.contents()
    pair.zombie.coordinator.finish(state, {"final_loss": -1.0}, LOST if state == "failed" else None)
    assert pair.zombie.contents() == before


def test_a_stop_of_a_zombie_leaves_the_record_alone(pair: Pair) -> None:
    before = pair.zombie.dir.run_json.read_bytes()
    pair.zombie.coordinator.request_stop("SIGTERM")
    assert pair.zombie.dir.run_json.read_bytes() == before


def test_the_newer_goes_on_undisturbed_whatever_the_zombie_does(pair: Pair) -> None:
    zombie, newer = pair.zombie, pair.newer
    for step in range(6, 20):
        with pytest.raises(StaleAttemptError):
            zombie.step(step)
        with pytest.raises(StaleAttemptError):
            zombie.commit(step)
        zombie.coordinator.tick(time.monotonic())
        newer.step(step)
        if step % 2 == 0:
            assert newer.commit(step).committed_step == step
    zombie.coordinator.finish("failed", {})
    newer.send(RankDone("completed", 19))
    newer.coordinator.finish("completed", {"final_loss": 2.0})
    record = read_json(newer.dir.run_json)
    assert (record["state"], record["attempt"], record["step"]) == ("completed", 2, 19)
    rows = last_rows(newer.dir.metrics)
    assert {step: row["attempt"] for step, row in rows.items()} == {
        **dict.fromkeys(range(1, 5), 1), **dict.fromkeys(range(5, 20), 2)
    }  # fmt: skip
    assert newer.checkpoints == [(2, 1), (4, 1), *((step, 2) for step in range(6, 20, 2))]


# A zombie that had already passed the check ----------------------------------


def past_the_check(zombie: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked just before the takeover, and was suspended until now."""
    group = zombie.coordinator._group
    monkeypatch.setattr(group, "check_newest", lambda: None)
    monkeypatch.setattr(group.saves, "_check_newest", lambda: None)


def test_beyond_the_fork_a_late_commit_does_not_count_at_or_below_it_does(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    past_the_check(pair.zombie, monkeypatch)
    for step in (6, 3, 5):
        assert pair.zombie.commit(step).committed_step == step
        assert (pair.zombie.dir.checkpoint(step, 1) / MANIFEST).exists()
    assert pair.newer.checkpoints == [(2, 1), (3, 1), (4, 1)]
    pair.newer.commit(6)
    assert pair.newer.checkpoints == [(2, 1), (3, 1), (4, 1), (6, 2)]
    third = Driver(pair.newer.dir)
    assert third.open().start_checkpoint == f"checkpoints/step-00000006-a0002/{MANIFEST}"


def test_a_late_commit_between_the_fork_and_a_damaged_newer_checkpoint_does_not_count(
    run_dir: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step 4 of attempt 1 is damaged, so attempt 2 forks off at step 2: step 3 of attempt 1 is beyond that.
    zombie = Driver(run_dir)
    zombie.open()
    for step in (2, 4):
        zombie.commit(step)
    (run_dir.checkpoint(4, 1) / slices_name(0, 1)).unlink()
    newer = Driver(run_dir)
    assert newer.open().start_checkpoint == f"checkpoints/step-00000002-a0001/{MANIFEST}"
    past_the_check(zombie, monkeypatch)
    for step in (1, 3, 6):
        zombie.commit(step)
    assert newer.checkpoints == [(1, 1), (2, 1)]
    newer.commit(4)
    assert newer.checkpoints == [(1, 1), (2, 1), (4, 2)]


def test_the_clean_up_of_a_zombie_spares_what_the_newer_one_is_writing_and_reads(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = pair.newer
    newer.commit(6)
    newer.write(8)  # staged, not committed
    before = {name: data for name, data in newer.contents().items() if "-a0002/" in name or "000004-a0001/" in name}
    assert len(before) == 5
    past_the_check(pair.zombie, monkeypatch)
    pair.zombie.commit(6)
    pair.zombie.commit(8)
    assert {name: data for name, data in newer.contents().items() if name in before} == before
    assert newer.checkpoints == [(2, 1), (4, 1), (6, 2)]


def test_the_clean_up_of_a_zombie_that_keeps_fewer_spares_the_newers_checkpoints(
    run_dir: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    zombie = Driver(run_dir, keep_last=1)
    zombie.open()
    zombie.commit(4)
    newer = Driver(run_dir, keep_last=10)
    newer.open()
    for step in (6, 8):
        newer.commit(step)
    past_the_check(zombie, monkeypatch)
    zombie.commit(6)
    assert [(step, attempt) for step, attempt in newer.checkpoints if attempt == 2] == [(6, 2), (8, 2)]


def test_a_late_row_of_a_zombie_is_not_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    past_the_check(pair.zombie, monkeypatch)
    pair.zombie.step(5)
    assert last_rows(pair.newer.dir.metrics)[5]["attempt"] == 2


# The rule of lineage against a model -----------------------------------------


@dataclass
class World:
    """A brute-force model: every attempt carries the set of checkpoints that its history holds.

    `follow` walks back from the newest attempt; the model pushes each commit forward, at the moment it happens, to
    every attempt whose history goes through it.
    """

    attempts: list[Attempt]
    histories: dict[int, set[tuple[int, int]]]
    manifests: list[tuple[int, int]]

    def take(self, start: tuple[int, int]) -> None:
        """A driver takes the next number, starting from (step, attempt), or anew from (0, 0)."""
        step, parent = start
        number = len(self.attempts) + 1
        self.attempts.append(Attempt(number, step, parent, 0.0))
        self.histories[number] = {m for m in self.histories.get(parent, set()) if m[0] <= step}

    def commit(self, step: int, number: int) -> None:
        """An attempt, maybe a zombie, commits a step."""
        self.manifests.append((step, number))
        holds = {number}
        for attempt in self.attempts:  # oldest first: a parent comes before its children
            if attempt.start_attempt in holds and step <= attempt.start_step:
                holds.add(attempt.number)
        for other in holds:
            self.histories[other].add((step, number))

    @property
    def counts(self) -> list[tuple[int, int]]:
        return sorted(self.histories[len(self.attempts)]) if self.attempts else []


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Random chains: forks at any checkpoint that counts (damage passes over the newest), zombies at any time."""
    world = World([], {}, [])
    for _ in range(draw(st.integers(0, 25))):
        if not world.attempts or draw(st.integers(0, 3)) == 0:
            world.take(draw(st.sampled_from([(0, 0), *world.counts, *world.counts])))
        else:
            attempt = draw(st.sampled_from(world.attempts))
            step = attempt.start_step + draw(st.integers(1, 6))
            if (step, attempt.number) not in world.manifests:
                world.commit(step, attempt.number)
    return world


def refs(manifests: Sequence[Manifest]) -> list[tuple[int, int]]:
    return [(m.step, m.attempt) for m in manifests]


@settings(max_examples=400, deadline=None)
@given(world=worlds(), data=st.data())
def test_follow_agrees_with_a_model_that_pushes_every_commit_forward(world: World, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(world.manifests))
    found = refs(follow(world.attempts, [make_manifest(*ref) for ref in shuffled]))
    assert found == world.counts
    # One history: no step twice, and the steps of later attempts come later.
    assert [step for step, _ in found] == sorted({step for step, _ in found})
    assert [attempt for _, attempt in found] == sorted(attempt for _, attempt in found)
    if world.attempts and world.attempts[-1].start_step:
        newest = world.attempts[-1]
        assert (newest.start_step, newest.start_attempt) in found, "what an attempt started from always counts"


@settings(max_examples=150, deadline=None)
@given(world=worlds().filter(lambda w: bool(w.attempts)), data=st.data())
def test_a_zombie_beyond_every_fork_changes_nothing_that_is_read(world: World, data: st.DataObject) -> None:
    before = follow(world.attempts, [make_manifest(*ref) for ref in world.manifests])
    newest = world.attempts[-1]
    zombies = world.attempts[:-1]
    late = [
        make_manifest(data.draw(st.integers(newest.start_step + 1, newest.start_step + 9)), zombie.number)
        for zombie in zombies
    ]
    after = follow(world.attempts, [*(make_manifest(*ref) for ref in world.manifests), *late])
    assert refs(after) == refs(before)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds())
def test_what_counts_on_disk_is_what_counts_in_the_model(world: World, tmp_path_factory: Any) -> None:
    store = LocalStore(tmp_path_factory.mktemp("world"))
    for attempt in world.attempts:
        start = make_manifest(attempt.start_step, attempt.start_attempt) if attempt.start_attempt else None
        assert take_attempt(store, start).number == attempt.number
    for ref in world.manifests:
        manifest = make_manifest(*ref)
        path = store.root / manifest.directory / MANIFEST
        path.parent.mkdir(parents=True)
        path.write_bytes(manifest.encode())
    assert refs(committed(store)) == world.counts


# Two real drivers -----------------------------------------------------------

CHANGES: dict[str, Any] = {
    "train__max_steps": 40, "checkpoint__every_steps": 5, "checkpoint__keep_last": 10, "data__eval": None
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, starter: str) -> Group:
    group = run_group(tiny_config(tmp_path_factory.mktemp("undisturbed"), **CHANGES), starter)
    assert group.outcome == "completed"
    return group


@pytest.fixture
def started() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    """Starts commands, and ends those that are left."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def wait_for(what: str, condition: Callable[[], bool], *alive: subprocess.Popen[str], limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        for process in alive:
            assert process.poll() is None, (what, process.communicate())
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s:.0f} s"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "held_until", ["the takeover", pytest.param("the second has completed", marks=pytest.mark.faults)]
)
def test_of_two_drivers_the_second_takes_over_and_the_first_ends_itself(
    held_until: str,
    undisturbed: Group,
    started: Callable[[list[str]], subprocess.Popen[str]],
    cli: str,
    ray_address: str,
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path, **CHANGES)
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_yaml(config))
    # Ranks that are held are not to count as hung before a slow machine has started the second driver.
    command = [cli, "train", str(path), f"cluster.address={ray_address}", "failure.limits.step_s=600"]
    run_dir = open_run(tmp_path / "runs" / "t")
    first = started(command)
    wait_for("a checkpoint", lambda: (run_dir.checkpoint(5, 1) / MANIFEST).exists(), first)
    wait_for("state running", lambda: read_json(run_dir.run_json)["state"] == "running", first)
    # The first one's ranks (and in one case the driver, as when a machine is suspended) are held, so that it cannot
    # reach its end before the second has begun, however fast this machine is.
    ranks = [int(worker["pid"]) for worker in read_json(run_dir.run_json)["workers"]]
    assert len(ranks) == 2
    assert all(map(is_alive, ranks))
    held = ranks + ([first.pid] if held_until != "the takeover" else [])
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    assert not list(run_dir.exports.glob("*")), "the first one was too fast"
    second = started([*command, "--resume"])
    wait_for("the takeover", lambda: (run_dir.attempts / "0002.json").exists(), second)
    if held_until != "the takeover":
        out, err = second.communicate(timeout=120)
        assert second.returncode == 0, err
    before = run_dir.run_json.read_bytes()
    for pid in held:
        with contextlib.suppress(ProcessLookupError):  # a rank that was ended with its lease, held as it was
            os.kill(pid, signal.SIGCONT)
    began = time.monotonic()
    _, loser_err = first.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert first.returncode == 1, loser_err
    errors = [line for line in loser_err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, loser_err
    assert "attempt 2 of this run has begun elsewhere; attempt 1 writes nothing more" in errors[0]
    assert "Traceback" not in loser_err
    wait_for("the end of the loser's ranks", lambda: not any(map(is_alive, ranks)), limit_s=5)
    if held_until == "the takeover":
        out, err = second.communicate(timeout=120)
        assert second.returncode == 0, err
    else:
        assert run_dir.run_json.read_bytes() == before
    assert "completed after 40 steps" in out
    assert "error: " not in err
    record = read_json(run_dir.run_json)
    assert (record["state"], record["attempt"], record["step"], record["error"]) == ("completed", 2, 40, None)
    _assert_ends_as(undisturbed, run_dir)


def _assert_ends_as(undisturbed: Group, run_dir: Run) -> None:
    rows = last_rows(run_dir.metrics)
    assert {step: row["digest"] for step, row in rows.items()} == undisturbed.digests
    assert {step: row["loss"] for step, row in rows.items()} == undisturbed.losses
    start = read_attempts(LocalStore(run_dir.path))[-1].start_step
    assert start >= 5
    assert {row["attempt"] for step, row in rows.items() if step > start} == {2}
    mine, wanted = (committed(LocalStore(d.path))[-1] for d in (run_dir, undisturbed.run_dir))
    assert (mine.step, mine.attempt, mine.cursor) == (40, 2, wanted.cursor)
    assert [file.xxh3 for file in mine.files] == [file.xxh3 for file in wanted.files]
    assert read_json(run_dir.run_json)["result"]["final_loss"] == undisturbed.losses[40]
