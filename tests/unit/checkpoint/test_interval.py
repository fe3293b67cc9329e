"""The interval between checkpoints is the one that loses the least time."""

from __future__ import annotations

import math

import pytest

from dist_ft.checkpoint.interval import PRIOR_S, mean_time_between_failures_s, optimal_interval_s


def lost_share(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Daly's model (2006, equation 20, without restart): wall time over useful time, with exponential failures."""
    return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(0.05, 86_400), (1, 3600), (30, 3600), (60, 600), (200, 600)])
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float) -> None:
    best = lost_share(optimal_interval_s(cost_s, mtbf_s), cost_s, mtbf_s)
    for factor in (0.5, 0.8, 0.9, 1.1, 1.25, 2.0):
        assert best < lost_share(factor * optimal_interval_s(cost_s, mtbf_s), cost_s, mtbf_s)


def test_it_is_youngs_for_cheap_checkpoints() -> None:
    assert optimal_interval_s(1, 1e6) == pytest.approx(math.sqrt(2 * 1e6), rel=1e-3)
    assert optimal_interval_s(300, 100) == 100


def test_failures_that_were_seen_outweigh_the_prior() -> None:
    assert mean_time_between_failures_s(0, 0) == PRIOR_S
    assert mean_time_between_failures_s(10 * PRIOR_S, 99) == pytest.approx(0.11 * PRIOR_S)
