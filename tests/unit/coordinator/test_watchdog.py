"""The rank that holds the others up is the one that is named."""

from __future__ import annotations

import pytest

from dist_ft.config.cluster_sections import PhaseLimits
from dist_ft.coordinator.watchdog import (
    STEPS_TO_COMPARE,
    History,
    RankView,
    find_culprits,
    find_stalled,
    find_straggler,
    phase_limit,
)
from dist_ft.messages import Phase, Whereabouts

NOW = 100_000.0


def _limit(phase: str) -> float:
    """Of a run that has no history yet."""
    return phase_limit(phase, 3, PhaseLimits(), History())


def _view(rank: int, phase: str, step: int, idle_s: float) -> RankView:
    return RankView(rank, phase, step, NOW - idle_s)


def _late(phase: str) -> float:
    return _limit(phase) + 1


@pytest.mark.parametrize("phase", Phase)
def test_the_limit_of_every_phase_can_be_set(phase: str) -> None:
    limits = PhaseLimits.model_validate({f"{phase}_s": 7.5})
    assert phase_limit(phase, 3, limits, History()) == 7.5
    assert _limit(phase) > 7.5


def test_without_ranks_nobody_is_late() -> None:
    assert find_stalled([], NOW, _limit) == []


@pytest.mark.parametrize("phase", Phase)
def test_within_the_limit_nobody_is_late(phase: str) -> None:
    assert find_stalled([_view(r, phase, 5, _limit(phase) - 1) for r in range(3)], NOW, _limit) == []


@pytest.mark.parametrize("phase", Phase)
def test_a_rank_over_the_limit_of_its_phase_is_named(phase: str) -> None:
    (found,) = find_stalled([_view(0, phase, 5, _late(phase))], NOW, _limit)
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
        found = find_stalled(order, NOW, _limit)
        assert found[0].rank == culprit
        assert len(found) == (3 if case.startswith("all alike") else 1)


@pytest.mark.parametrize("phase", ["save", "evaluate", "load"])
def test_a_wait_may_last_as_long_as_what_is_waited_for(phase: str) -> None:
    views = [_view(0, "step", 40, _limit("step") + 100), _view(1, phase, 40, _limit(phase) - 100)]
    assert find_stalled(views, NOW, _limit) == []


def test_a_step_is_judged_by_the_steps_before_it_at_this_size() -> None:
    history = History()
    for seconds in (2.0, 2.1, 1.9, 2.0, 30.0, 2.0):
        history.add_step(3, seconds)
    assert phase_limit("step", 3, PhaseLimits(), history) == pytest.approx(
        14.0
    )  # and two seconds to find out which rank it is
    assert phase_limit("step", 2, PhaseLimits(), history) == _limit("step")
    views = [_view(0, "step", 41, 11.0), _view(1, "step", 40, 16.5)]
    (found,) = find_stalled(views, NOW, lambda phase: phase_limit(phase, 3, PhaseLimits(), history))
    assert found.rank == 1


@pytest.mark.parametrize(
    ("states", "culprits"),
    [
        ({0: "waits", 1: "stopped", 2: "waits"}, [1]),
        ({0: "works", 1: "stopped", 2: "works"}, [1]),
        ({0: "waits", 1: "works", 2: "waits"}, [1]),
        ({0: "waits", 2: "waits"}, [1]),
        ({0: "works", 2: "works"}, [1]),
        ({0: "waits", 1: "waits", 2: "waits"}, [0, 1, 2]),
        ({}, [0, 1, 2]),
    ],
)
def test_of_ranks_that_are_alike_those_that_wait_for_nobody_are_named(
    states: dict[int, Whereabouts], culprits: list[int]
) -> None:
    assert find_culprits([0, 1, 2], states) == culprits


def test_a_few_steps_are_no_measure() -> None:
    history = History()
    for _ in range(4):
        history.add_step(3, 0.1)
    assert phase_limit("step", 3, PhaseLimits(), history) == _limit("step")


@pytest.mark.parametrize("phase", ["load", "first_step", "evaluate", "save"])
def test_a_phase_is_judged_by_its_longest_visit(phase: str) -> None:
    history = History()
    history.add_phase(phase, 5.0)
    assert phase_limit(phase, 3, PhaseLimits(), history) == 600.0  # a disk may stall
    for seconds in (70.0, 80.0, 1.0):
        history.add_phase(phase, seconds)
    assert phase_limit(phase, 3, PhaseLimits(), history) == 800.0
    history.add_phase(phase, 1e6)
    assert phase_limit(phase, 3, PhaseLimits(), history) == _limit(phase)  # never more than without a history


def test_a_rank_that_is_slow_for_long_is_named() -> None:
    assert find_straggler([[1.0, 1.1, 2.5, 0.9]] * STEPS_TO_COMPARE) == (2, pytest.approx(2.5))


@pytest.mark.parametrize(
    "times",
    [
        [[1.0, 5.0]] * (STEPS_TO_COMPARE - 1),
        [[1.0, 1.0, 1.9]] * STEPS_TO_COMPARE,
        [[1.0, 9.0], *[[1.0, 1.0]] * STEPS_TO_COMPARE],
        [[3.0]] * STEPS_TO_COMPARE,
    ],
    ids=["for a short while", "a little", "once", "alone"],
)
def test_others_are_not(times: list[list[float]]) -> None:
    assert find_straggler(times) is None
