"""The learning rate: a function of the step alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from dist_ft.config.training_sections import ScheduleConfig
from dist_ft.train.schedule import learning_rate

PEAK = 2e-4
KINDS = ("cosine", "linear", "constant")
LENGTHS = (1, 2, 3, 10, 97, 1000)


def _rates(max_steps: int, **schedule: Any) -> list[float]:
    config = ScheduleConfig.model_validate(schedule)
    return [learning_rate(config, PEAK, step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_warm_up_rises_evenly_to_the_peak(kind: str) -> None:
    rates = _rates(100, kind=kind, warmup_ratio=0.1)
    assert rates[:10] == pytest.approx([PEAK * k / 10 for k in range(1, 11)])
    assert max(rates) == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_steps", LENGTHS)
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("minimum", [0.0, 0.1, 1.0])
def test_rates_rise_to_the_peak_and_then_never_again(kind: str, max_steps: int, warmup: float, minimum: float) -> None:
    rates = _rates(max_steps, kind=kind, warmup_ratio=warmup, min_lr_ratio=minimum)
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in rates)
    top = rates.index(max(rates))
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(rates[top:]))
    assert max(rates) == pytest.approx(PEAK)


@pytest.mark.parametrize(("kind", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_half_way_between_warm_up_and_end(kind: str, half: float) -> None:
    assert _rates(100, kind=kind, warmup_ratio=0.2)[60] == pytest.approx(half * PEAK)


@pytest.mark.parametrize("minimum", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_rate_falls_towards_the_minimum(kind: str, minimum: float) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "min_lr_ratio": minimum})
    assert learning_rate(config, PEAK, 1000, 1000) == pytest.approx(minimum * PEAK, abs=1e-12)
    last = learning_rate(config, PEAK, 999, 1000)
    assert minimum * PEAK < last < (minimum + 2e-3) * PEAK


def test_the_cosine_is_half_a_cosine() -> None:
    config = ScheduleConfig.model_validate({"kind": "cosine", "warmup_ratio": 0.0})
    for step in range(50):
        expected = PEAK * (1 + math.cos(math.pi * step / 50)) / 2
        assert learning_rate(config, PEAK, step, 50) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_on_with_the_same_rates(kind: str) -> None:
    whole = _rates(40, kind=kind, warmup_ratio=0.1)
    for start in range(40):
        config = ScheduleConfig.model_validate({"kind": kind, "warmup_ratio": 0.1})
        assert [learning_rate(config, PEAK, step, 40) for step in range(start, 40)] == whole[start:]


@pytest.mark.parametrize(("ratio", "max_steps", "warmup"), [(0.07, 100, 7), (0.28, 100, 28), (0.14, 50, 7)])
def test_the_warm_up_is_a_share_of_the_steps(ratio: float, max_steps: int, warmup: int) -> None:
    rates = _rates(max_steps, kind="linear", warmup_ratio=ratio)
    assert rates[warmup - 1] == pytest.approx(PEAK)
