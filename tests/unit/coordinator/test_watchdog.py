"""The rank that holds the others up is the one that is named."""

from __future__ import annotations

import pytest

from dist_ft.coordinator.watchdog import LIMITS_S, PHASES, RankView, find_stalled, step_limit

NOW = 100_000.0


def _view(rank: int, phase: str, step: int, idle_s: float) -> RankView:
    return RankView(rank, phase, step, NOW - idle_s)


def _late(phase: str) -> float:
    return LIMITS_S[phase] + 1


def test_every_phase_has_a_limit() -> None:
    assert set(LIMITS_S) == set(PHASES)


def test_without_ranks_nobody_is_late() -> None:
    assert find_stalled([], NOW, LIMITS_S["step"]) is None


@pytest.mark.parametrize("phase", PHASES)
def test_within_the_limit_nobody_is_late(phase: str) -> None:
    assert find_stalled([_view(r, phase, 5, LIMITS_S[phase] - 1) for r in range(3)], NOW, LIMITS_S["step"]) is None


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_over_the_limit_of_its_phase_is_named(phase: str) -> None:
    found = find_stalled([_view(0, phase, 5, _late(phase))], NOW, LIMITS_S["step"])
    assert found is not None
    assert (found.rank, found.phase) == (0, phase)


CULPRITS: dict[str, tuple[list[RankView], int]] = {
    "a step behind": (
        [_view(0, "step", 41, 2000), _view(1, "step", 40, 2000), _view(2, "step", 41, 2000)],
        1,
    ),
    "a step behind, although another has been silent longer": (
        [_view(0, "step", 41, 3000), _view(1, "step", 40, 2000)],
        1,
    ),
    "a phase behind": ([_view(0, "save", 40, 8000), _view(1, "evaluate", 40, 8000)], 1),
    "in a save that the others have behind them": ([_view(0, "step", 40, 4000), _view(1, "save", 40, 4000)], 1),
    "in an evaluation that the others have behind them": (
        [_view(0, "step", 40, 8000), _view(1, "evaluate", 40, 8000)],
        1,
    ),
    "still loading while the others wait for it": (
        [_view(0, "first_step", 0, _late("first_step")), _view(1, "load", 0, _late("load"))],
        1,
    ),
    "never started": ([_view(0, "load", 0, 10), _view(1, "start", 0, _late("start"))], 1),
    "all alike: the one that has been silent longest": (
        [_view(0, "step", 40, 1900), _view(1, "step", 40, 2500), _view(2, "step", 40, 1900)],
        1,
    ),
}


@pytest.mark.parametrize("case", sorted(CULPRITS))
def test_the_one_behind_is_named(case: str) -> None:
    views, culprit = CULPRITS[case]
    for order in (views, views[::-1]):
        found = find_stalled(order, NOW, LIMITS_S["step"])
        assert found is not None
        assert found.rank == culprit


@pytest.mark.parametrize("phase", ["save", "evaluate", "load"])
def test_a_wait_may_last_as_long_as_what_is_waited_for(phase: str) -> None:
    views = [_view(0, "step", 40, LIMITS_S["step"] + 100), _view(1, phase, 40, LIMITS_S[phase] - 100)]
    assert find_stalled(views, NOW, LIMITS_S["step"]) is None


def test_a_step_is_judged_by_the_steps_before_it() -> None:
    views = [_view(0, "step", 41, 11.0), _view(1, "step", 40, 16.5)]
    limit = step_limit([2.0, 2.1, 1.9, 2.0, 30.0, 2.0], None)
    assert limit == pytest.approx(16.0)
    found = find_stalled(views, NOW, limit)
    assert found is not None
    assert found.rank == 1
    assert find_stalled([_view(0, "evaluate", 41, 300.0)], NOW, limit) is None


def test_a_few_steps_are_no_measure() -> None:
    assert step_limit([0.1] * 4, None) == LIMITS_S["step"]
    assert step_limit([], 7.0) == step_limit([0.1] * 50, 7.0) == 7.0
