"""What follows a failure: the cause that is named, the budget, the wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.config.cluster_sections import FailureConfig
from dist_ft.coordinator.failures import AttemptFailure, RankFailure, Recovery, decide_restart, explain, find_causes
from dist_ft.errors import (
    ConfigError,
    DataError,
    DistFtError,
    DivergedError,
    NodeLostError,
    OutOfMemoryError,
    StalledError,
    StorageError,
    WorkerCrashError,
)


def _said(rank: int, kind: str, is_death: bool = False) -> RankFailure:
    return RankFailure(rank, kind, f"rank {rank}", is_death)


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([_said(0, "WorkerCrashError"), _said(1, "WorkerCrashError", is_death=True)], 1),
        ([_said(1, "WorkerCrashError"), _said(0, "DivergedError")], 0),
        ([_said(2, "WorkerCrashError", is_death=True), _said(1, "DataError")], 1),
        ([_said(2, "WorkerCrashError"), _said(1, "WorkerCrashError")], 2),
        ([_said(1, "StalledError"), _said(0, "StaleAttemptError", is_death=True)], 0),
        ([_said(0, "WorkerCrashError", is_death=True), _said(1, "OutOfMemoryError", is_death=True)], 1),
        ([_said(1, "StalledError"), _said(0, "NodeLostError", is_death=True)], 0),
    ],
    ids=[
        "a death explains broken connections",
        "own words before",
        "own words before a death",
        "who spoke first",
        "overtaken",
        "no memory before a death",
        "a lost machine before a hang",
    ],
)
def test_the_failure_that_explains_the_others_is_the_cause(failures: list[RankFailure], cause: int) -> None:
    assert find_causes(failures)[0].rank == cause


def test_what_many_ranks_say_alike_is_said_once() -> None:
    failures = [replace(_said(rank, "DataError"), message="a.jsonl:3: broken") for rank in (2, 0, 1)]
    error = explain([*failures, _said(3, "WorkerCrashError")])
    assert type(error) is DataError
    assert str(error) == "ranks [0, 1, 2]: a.jsonl:3: broken"


CRASH = WorkerCrashError("killed by signal 9")


@pytest.mark.parametrize("error", [ConfigError("x"), DataError("x"), StorageError("x")])
def test_what_the_same_input_would_give_again_is_not_retried(error: DistFtError) -> None:
    decision = decide_restart([AttemptFailure(7, error)], FailureConfig())
    assert not decision.is_restart
    assert type(error).__name__ in decision.reason


@pytest.mark.parametrize("error", [CRASH, StalledError("x")])
def test_a_first_crash_or_hang_is_followed_by_a_restart_at_once(error: DistFtError) -> None:
    decision = decide_restart([AttemptFailure(7, error)], FailureConfig())
    assert (decision.is_restart, decision.wait_s) == (True, 0.0)


def test_failures_at_the_same_step_wait_longer_and_then_give_up() -> None:
    config = FailureConfig(max_same_step=4, backoff_s=2.0)
    decisions = [decide_restart([AttemptFailure(7, CRASH)] * count, config) for count in range(1, 5)]
    assert [d.is_restart for d in decisions] == [True, True, True, False]
    assert [d.wait_s for d in decisions[:3]] == [0.0, 2.0, 4.0]
    assert "4 failures in a row after step 7" in decisions[3].reason


def test_a_new_step_starts_the_count_again() -> None:
    config = FailureConfig(max_same_step=2)
    assert decide_restart([AttemptFailure(7, CRASH), AttemptFailure(8, CRASH)], config).is_restart
    assert not decide_restart([AttemptFailure(8, CRASH), AttemptFailure(8, CRASH)], config).is_restart


@pytest.mark.parametrize("most", [0, 1, 5])
def test_the_budget_ends(most: int) -> None:
    config = FailureConfig(max_restarts=most)
    failures = [AttemptFailure(step, CRASH) for step in range(most + 1)]
    assert all(decide_restart(failures[:count], config).is_restart for count in range(1, most + 1))
    last = decide_restart(failures, config)
    assert not last.is_restart
    assert f"failure.max_restarts={most}" in last.reason


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(0, 30), st.integers(1, 6), st.floats(0, 100))
def test_no_sequence_of_failures_restarts_for_ever_or_waits_over_a_minute(
    steps: list[int], most: int, same: int, backoff_s: float
) -> None:
    config = FailureConfig(max_restarts=most, max_same_step=same, backoff_s=backoff_s)
    restarts = 0
    for count in range(1, len(steps) + 1):
        decision = decide_restart([AttemptFailure(step, CRASH) for step in steps[:count]], config)
        assert 0 <= decision.wait_s <= 60
        if not decision.is_restart:
            break
        restarts += 1
    assert restarts <= most


def test_a_run_that_is_stopping_is_not_restarted() -> None:
    recovery = Recovery(FailureConfig())
    decision = recovery.decide(AttemptFailure(7, CRASH), True, 100.0)
    assert not decision.is_restart
    assert "--resume" in decision.reason


def test_the_next_attempt_waits_for_the_end_of_the_wait() -> None:
    recovery = Recovery(FailureConfig(backoff_s=3.0))
    assert recovery.may_open(0.0)
    recovery.decide(AttemptFailure(7, CRASH), False, 100.0)
    assert recovery.may_open(100.0)
    recovery.decide(AttemptFailure(7, CRASH), False, 101.0)
    assert not recovery.may_open(103.9)
    assert recovery.may_open(104.0)


@pytest.mark.parametrize(
    ("error", "key"),
    [
        (CRASH, "max_restarts"),
        (StalledError("x"), "max_restarts"),
        (NodeLostError("x"), "max_node_losses"),
        (OutOfMemoryError("x"), "max_out_of_memory"),
    ],
)
def test_each_cause_has_a_budget_of_its_own(error: DistFtError, key: str) -> None:
    config = FailureConfig.model_validate({"max_restarts": 9, "max_node_losses": 9, "max_out_of_memory": 9, key: 1})
    others = [WorkerCrashError("y"), NodeLostError("y"), OutOfMemoryError("y")]
    before = [AttemptFailure(step, other) for step, other in enumerate(others) if type(other) is not type(error)]
    before = [failure for failure in before if key != "max_restarts" or not isinstance(failure.error, WorkerCrashError)]
    assert decide_restart([*before, AttemptFailure(10, error)], config).is_restart
    last = decide_restart([*before, AttemptFailure(10, error), AttemptFailure(11, error)], config)
    assert not last.is_restart
    assert f"failure.{key}" in last.reason


def test_machines_may_come_and_go_at_the_same_step() -> None:
    config = FailureConfig(max_same_step=2)
    assert decide_restart([AttemptFailure(7, NodeLostError("x"))] * 5, config).is_restart
    assert not decide_restart(
        [AttemptFailure(7, NodeLostError("x"))] * 4 + [AttemptFailure(7, CRASH)], config
    ).is_restart


NAN = DivergedError("loss nan")


def test_bad_numbers_end_the_run_unless_the_config_says_otherwise() -> None:
    decision = decide_restart([AttemptFailure(7, NAN, 8)], FailureConfig())
    assert not decision.is_restart
    assert "failure.bad_numbers" in decision.reason


def test_a_step_with_bad_numbers_is_left_out_when_asked() -> None:
    decision = decide_restart([AttemptFailure(7, NAN, 8)], FailureConfig(bad_numbers="skip_batch"))
    assert (decision.is_restart, decision.skip_step, decision.wait_s) == (True, 8, 0.0)


def test_a_roll_back_is_tried_once_a_step() -> None:
    config = FailureConfig(bad_numbers="rollback")
    assert decide_restart([AttemptFailure(7, NAN, 8)], config).is_restart
    assert decide_restart([AttemptFailure(7, NAN, 8), AttemptFailure(20, NAN, 21)], config).is_restart
    again = decide_restart([AttemptFailure(7, NAN, 8), AttemptFailure(7, NAN, 8)], config)
    assert not again.is_restart
    assert "skip_batch" in again.reason


@pytest.mark.parametrize("policy", ["rollback", "skip_batch"])
def test_bad_numbers_have_a_limit(policy: str) -> None:
    config = FailureConfig.model_validate({"bad_numbers": policy, "max_bad_numbers": 2})
    failures = [AttemptFailure(step, NAN, step + 1) for step in (7, 17, 27)]
    assert [decide_restart(failures[:n], config).is_restart for n in (1, 2, 3)] == [True, True, False]


def test_an_end_that_is_no_failure_costs_no_budget() -> None:
    recovery = Recovery(FailureConfig(max_restarts=0))
    assert recovery.go_on("drained").is_restart
    assert recovery.may_open(0.0)
    assert not recovery.decide(AttemptFailure(7, CRASH), False, 1.0).is_restart
