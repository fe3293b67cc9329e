"""`checkpoint.every_steps: auto`: what a checkpoint costs is measured, and the next one is due when it pays."""

from __future__ import annotations

import itertools

import pytest

from dist_ft.checkpoint.interval import optimal_interval_s
from dist_ft.train.pace import AutoPace

MTBF_S = 10_000.0


def run(
    pace: AutoPace, seconds: float, *, step_s: float, slow_s: float, writing_s: float, blocking_s: float
) -> list[float]:
    """Plays a run on a clock; returns when checkpoints began."""
    now, saves, busy_until = 0.0, [], 0.0
    while now < seconds:
        is_writing = now < busy_until
        took = slow_s if is_writing else step_s
        now += took
        is_due = pace.is_due(now)
        pace.stepped(took, is_writing, now)
        if is_due and not is_writing:
            now += blocking_s
            pace.saved(blocking_s, now)
            saves.append(now)
            busy_until = now + writing_s
    return saves


def test_the_cost_is_what_blocks_and_what_the_steps_beside_it_lose() -> None:
    pace = AutoPace(MTBF_S, 0.0)
    saves = run(pace, 5000, step_s=1.0, slow_s=1.5, writing_s=9.0, blocking_s=2.0)
    assert pace.cost_s == pytest.approx(2.0 + 6 * 0.5)
    assert pace.interval_s == pytest.approx(optimal_interval_s(5.0, MTBF_S))
    assert pace.num_quiet_steps == round(pace.interval_s)
    gaps = [later - earlier for earlier, later in itertools.pairwise(saves)]
    assert gaps[3:] == pytest.approx([pace.interval_s] * len(gaps[3:]), abs=5.0)


def test_the_first_checkpoint_comes_before_anything_is_known_of_its_cost() -> None:
    saves = run(AutoPace(MTBF_S, 0.0), 1000, step_s=1.0, slow_s=1.0, writing_s=3.0, blocking_s=0.1)
    assert saves[0] == pytest.approx(optimal_interval_s(1.0, MTBF_S), abs=2.0)


def test_a_slow_disk_sets_the_least_interval() -> None:
    pace = AutoPace(100.0, 0.0)
    run(pace, 2000, step_s=1.0, slow_s=1.0, writing_s=300.0, blocking_s=0.0)
    assert pace.interval_s >= 299


def test_only_a_change_worth_telling_is_told() -> None:
    pace = AutoPace(MTBF_S, 0.0)
    assert not pace.is_news()  # nothing was measured
    told = 0
    for start in (0.0, 500.0, 1000.0):
        pace.saved(2.0, start)
        pace.stepped(1.0, False, start + 1.0)
        told += pace.is_news()
    assert told == 1
    for start in range(1500, 5000, 500):
        pace.saved(20.0, float(start))
        pace.stepped(1.0, False, start + 1.0)
        told += pace.is_news()
    assert told == 2
