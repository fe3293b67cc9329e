"""Useful step time ÷ time at work."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.coordinator.recorder import Recorder
from dist_ft.metric_rows import StepRow
from dist_ft.run.goodput import Goodput
from dist_ft.run.place import open_run
from dist_ft.run.state import RunRecord
from dist_ft.storage.publish import read_json, write_json
from tests.helpers.rows import step_row


def _rows(*seconds: float) -> dict[int, StepRow]:
    return {step: step_row(step, step_s=value) for step, value in enumerate(seconds, start=1)}


def test_a_run_that_does_nothing_but_step_has_all_of_it() -> None:
    goodput = Goodput({}, 0.0, began=100.0)
    for step in range(1, 11):
        goodput.add(step, 2.0)
    assert goodput.value(10, 120.0) == pytest.approx(1.0)


def test_a_step_that_is_made_again_counts_once() -> None:
    goodput = Goodput({}, 0.0, began=0.0)
    for step in (1, 2, 3, 4, 3, 4, 5):
        goodput.add(step, 2.0)
    assert goodput.useful_s(5) == pytest.approx(10.0)
    assert goodput.value(5, 14.0) == pytest.approx(10 / 14)


def test_steps_after_a_checkpoint_that_was_gone_back_to_do_not_count() -> None:
    goodput = Goodput(_rows(1.0, 1.0, 1.0, 1.0), 0.0, began=0.0)
    assert goodput.useful_s(2) == pytest.approx(2.0)


def test_the_night_between_two_drivers_is_nobodys_loss() -> None:
    goodput = Goodput(_rows(5.0, 5.0), 20.0, began=1_000_000.0)
    assert goodput.active_s(1_000_010.0) == pytest.approx(30.0)
    goodput.add(3, 5.0)
    assert goodput.value(3, 1_000_010.0) == pytest.approx(0.5)


def test_rows_that_are_lost_are_no_reason_to_fail() -> None:
    goodput = Goodput({5: step_row(5, step_s=1.0)}, 0.0, began=0.0)
    goodput.add(6, 1.0)
    assert goodput.useful_s(6) == pytest.approx(1.0)


def test_the_time_before_a_restart_of_the_coordinator_counts(tmp_path: Path) -> None:
    run_dir = open_run(tmp_path / "run")
    run_dir.path.mkdir()
    said = RunRecord("run", active_s=5.0)  # by the driver at its begin, and again after each restart
    Recorder(run_dir, replace(said), [])
    written = {**read_json(run_dir.run_json), "active_s": 100.0}
    write_json(run_dir.run_json, written)
    os.utime(run_dir.run_json, (time.time() - 7, time.time() - 7))
    restarted = replace(said)
    Recorder(run_dir, restarted, [])
    assert restarted.active_s == pytest.approx(107.0, abs=1.0)
    resumed = RunRecord("run", active_s=restarted.active_s + 3.0)  # a new driver, a night later
    os.utime(run_dir.run_json, (time.time() - 30_000, time.time() - 30_000))
    Recorder(run_dir, resumed, [])
    assert resumed.active_s == pytest.approx(110.0, abs=1.0)
