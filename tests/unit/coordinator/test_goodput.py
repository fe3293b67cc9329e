"""Useful step time ÷ time at work."""

from __future__ import annotations

import pytest

from dist_ft.coordinator.goodput import Goodput


def _rows(*seconds: float) -> dict[int, dict[str, float]]:
    return {step: {"step_s": value} for step, value in enumerate(seconds, start=1)}


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
    goodput = Goodput({5: {"step_s": 1.0}}, 0.0, began=0.0)
    goodput.add(6, 1.0)
    assert goodput.useful_s(6) == pytest.approx(1.0)
