"""Numbers that are not finite, and spikes."""

from __future__ import annotations

import math

import pytest

from dist_ft.train.numbers import find_bad_numbers

CALM = [2.0, 2.1, 1.9, 2.0] * 5


@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 1.0)]
)
def test_what_is_not_finite_is_bad_and_named(loss: float, grad_norm: float) -> None:
    found = find_bad_numbers(loss, grad_norm, CALM, None)
    assert found is not None
    assert str(loss) in found and str(grad_norm) in found


@pytest.mark.parametrize(
    ("loss", "recent", "factor", "is_bad"),
    [
        (6.1, CALM, 3.0, True),
        (5.9, CALM, 3.0, False),
        (1e9, CALM, None, False),
        (1e9, CALM[:19], 3.0, False),  # too few to tell
        (6.1, [*CALM, 50.0, 60.0], 3.0, True),  # what was high before does not hide it
    ],
)
def test_a_spike_is_told_by_the_median_of_the_last_losses(
    loss: float, recent: list[float], factor: float | None, is_bad: bool
) -> None:
    assert (find_bad_numbers(loss, 1.0, recent, factor) is not None) == is_bad
