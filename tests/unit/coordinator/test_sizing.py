"""How many workers a run has: what is allowed, when it grows, when it leaves."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.config.cluster_sections import ClusterConfig
from dist_ft.coordinator.sizing import ClusterView, Progress, Sizing, gain_s, largest_allowed
from dist_ft.coordinator.watchdog import History


def _cluster(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"num_workers": [2, 8], **changes})


def _history(**step_s: float) -> History:
    history = History()
    for size, seconds in step_s.items():
        for _ in range(10):
            history.add_step(int(size.removeprefix("on_")), seconds)
    return history


@pytest.mark.parametrize(
    ("fits", "allowed", "size"),
    [
        (1, None, None),
        (2, None, 2),
        (5, None, 5),
        (40, None, 8),
        (5, [2, 4, 8], 4),
        (40, [2, 4], 4),
        (3, [4, 8], None),
        (8, [16], None),
    ],
)
def test_the_largest_allowed_size_that_fits(fits: int, allowed: list[int] | None, size: int | None) -> None:
    assert largest_allowed(fits, _cluster(allowed_sizes=allowed)) == size


def test_what_is_gained_is_measured_or_guessed_by_the_busiest_rank() -> None:
    progress = Progress(world_size=2, steps_left=100, batch=8, resize_s=15.0)
    assert gain_s(progress, 4, History()) == 0.0
    assert gain_s(progress, 4, _history(on_2=1.0)) == pytest.approx(50.0)
    assert gain_s(progress, 3, _history(on_2=1.0)) == pytest.approx(25.0)  # 3 of 8 sequences, instead of 4
    assert gain_s(progress, 4, _history(on_2=1.0, on_4=0.9)) == pytest.approx(10.0)
    assert gain_s(progress, 4, _history(on_2=1.0, on_4=1.2)) < 0


def _progress(steps_left: int = 100) -> Progress:
    return Progress(world_size=2, steps_left=steps_left, batch=8, resize_s=15.0)


def test_a_machine_that_gives_notice_is_left_at_once() -> None:
    reason = Sizing(_cluster()).reason_to_drain(ClusterView(1, ("10.0.0.9",)), _progress(), History(), 0.0)
    assert reason is not None
    assert "10.0.0.9" in reason


def test_a_machine_that_joins_must_stay_for_a_while() -> None:
    sizing, history = Sizing(_cluster(grow_after_s=30)), _history(on_2=1.0)
    room, none = ClusterView(4), ClusterView(2)
    times: list[tuple[ClusterView, float, bool]] = [
        (room, 0.0, False), (room, 29.0, False), (none, 29.5, False), (room, 30.0, False), (room, 59.0, False),
        (room, 60.0, True),
    ]  # fmt: skip
    for view, now, grows in times:
        assert (sizing.reason_to_drain(view, _progress(), history, now) is not None) == grows, now


def test_a_machine_that_joins_must_be_worth_the_interruption() -> None:
    history = _history(on_2=1.0)
    for steps_left, grows in ((29, False), (31, True)):
        sizing = Sizing(_cluster(grow_after_s=0))
        assert (sizing.reason_to_drain(ClusterView(4), _progress(steps_left), history, 0.0) is not None) == grows
    heedless = Sizing(_cluster(grow_after_s=0, grow_if_it_pays=False))
    assert heedless.reason_to_drain(ClusterView(4), _progress(1), history, 0.0) is not None


@pytest.mark.parametrize("changes", [{"grow_after_s": None}, {"num_workers": [1, 2]}, {"allowed_sizes": [2]}])
def test_a_run_that_may_not_grow_does_not(changes: dict[str, Any]) -> None:
    sizing = Sizing(_cluster(**{"grow_after_s": 0, **changes}))
    for now in (0.0, 1000.0):
        assert sizing.reason_to_drain(ClusterView(4), _progress(), _history(on_2=1.0), now) is None


def test_what_a_resize_costs_is_measured_from_the_first_interruption_to_the_next_step() -> None:
    sizing = Sizing(_cluster())
    sizing.stepped(5.0)
    assert sizing.resize_s == 15.0  # a guess
    sizing.interrupted(10.0)
    sizing.interrupted(13.0)
    sizing.stepped(32.0)
    assert sizing.resize_s == 22.0
