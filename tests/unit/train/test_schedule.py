"""The learning rate: a function of the step alone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from dist_ft.config.training_sections import ScheduleConfig
from dist_ft.train.schedule import learning_rate

PEAK = 2e-4
KINDS = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "wsd")
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


THEIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant_with_warmup", {}, {}),
    ("linear", {"kind": "linear"}, {}),
    ("cosine", {"kind": "cosine"}, {}),
    ("cosine_with_restarts", {"kind": "cosine", "num_cycles": 3}, {"num_cycles": 3}),
    ("inverse_sqrt", {"kind": "inverse_sqrt"}, {}),
    ("polynomial", {"kind": "polynomial", "power": 2.5, "min_lr_ratio": 0.1}, {"power": 2.5, "lr_end": 0.1 * PEAK}),
    ("warmup_stable_decay", {"kind": "wsd", "decay_ratio": 0.3}, {"num_decay_steps": 30, "decay_type": "linear"}),
    (
        "warmup_stable_decay",
        {"kind": "wsd", "decay_ratio": 0.25, "decay_kind": "1-sqrt", "min_lr_ratio": 0.2},
        {"num_decay_steps": 25, "decay_type": "1-sqrt", "min_lr_ratio": 0.2},
    ),
    (
        "warmup_stable_decay",
        {"kind": "wsd", "decay_ratio": 1.0, "warmup_steps": 0, "decay_kind": "cosine"},
        {"num_decay_steps": 100, "decay_type": "cosine"},
    ),
]


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize(("name", "ours", "theirs"), THEIRS)
def test_rates_are_those_of_transformers(name: str, ours: dict[str, Any], theirs: dict[str, Any], warmup: int) -> None:
    """From the end of the warm-up on; in it, theirs is a step behind."""
    ours = {"kind": name, "warmup_steps": warmup, **ours}
    warmup = ours["warmup_steps"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=100, scheduler_specific_kwargs=theirs
    )
    wanted = [PEAK * scheduler.lr_lambdas[0](step) for step in range(101)]
    found = _rates(100, **ours)
    assert found[warmup:] == pytest.approx(wanted[warmup:100], rel=1e-12)
    if theirs.get("min_lr_ratio") is None:  # theirs then rises from the minimum
        assert found[:warmup] == pytest.approx(wanted[1 : warmup + 1], rel=1e-12)


def test_a_warm_up_in_steps_is_that_of_a_ratio() -> None:
    assert _rates(100, warmup_steps=7) == _rates(100, warmup_ratio=0.07)
    assert _rates(100, warmup_steps=0) == _rates(100, warmup_ratio=0.0)


def test_a_warm_up_may_be_longer_than_the_run() -> None:
    assert _rates(5, warmup_steps=10) == pytest.approx([PEAK * k / 10 for k in range(1, 6)])


def test_restarts_begin_at_the_peak() -> None:
    rates = _rates(90, kind="cosine", num_cycles=3, warmup_ratio=0.0)
    assert rates[0] == rates[30] == rates[60] == PEAK
    assert rates[:30] == pytest.approx(rates[30:60])


def test_wsd_is_flat_until_its_last_steps() -> None:
    rates = _rates(100, kind="wsd", warmup_ratio=0.1, decay_ratio=0.2)
    assert set(rates[10:81]) == {PEAK}
    assert rates[90] == pytest.approx(PEAK / 2)
