"""Maps each position to its source, and to the number of earlier positions of that source. Pure integer arithmetic.

A source has an integer rate. A period is as many positions as the sum of the rates; in each period, a source is taken
as often as its rate says, as evenly as whole numbers allow. Only floor functions are used, so every count is monotone,
exact at the end of a period, and computed without a walk.

Worked example. Rates 6 and 3 make periods of 9: B A A B A A B A A.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from dist_ft.data.stream.permute import Ints

RATE_TOTAL = 1 << 30
"""Sum of the rates that are made from weights, so that a share is exact to one in a billion."""
_MAX_PRODUCT = (1 << 63) - 1


def rates_of(weights: Sequence[float]) -> list[int]:
    """Return integer rates in proportion to the weights, rounded by largest remainder."""
    whole = sum(map(Fraction, weights))
    exact = [RATE_TOTAL * Fraction(weight) / whole for weight in weights]
    rates = [int(share) for share in exact]
    by_remainder = sorted(range(len(rates)), key=lambda i: (rates[i] - exact[i], i))
    for i in by_remainder[: RATE_TOTAL - sum(rates)]:
        rates[i] += 1
    return rates


def split(positions: Ints, rates: Sequence[int]) -> tuple[Ints, Ints]:
    """Return for each position its source, and the number of the source's sequences before it.

    Source 0 takes positions at its rate, source 1 takes its rate of the remaining positions, and so on.
    """
    total = sum(rates)
    periods, left = np.divmod(positions, total)
    if total * total > _MAX_PRODUCT and sum(rate > 0 for rate in rates) > 1:
        left = left.astype(object)  # slower, but never wrong: billions of sequences in several sources
    source, used = np.full(len(positions), -1), np.zeros(len(positions), np.int64)
    for index, rate in enumerate(rates):
        if rate == 0:
            continue
        before = left if rate == total else left * rate // total
        takes = True if rate == total else (left + 1) * rate // total > before
        mine = (source < 0) & takes
        source[mine] = index
        used[mine] = before[mine].astype(np.int64) + periods[mine] * rate
        left = left - before
        total -= rate
    return source, used


def counts_before(position: int, rates: Sequence[int]) -> list[int]:
    """Return the number of sequences of each source before a position."""
    total = sum(rates)
    period, left = divmod(position, total)
    counts = []
    for rate in rates:
        before = left * rate // total if rate else 0
        counts.append(period * rate + before)
        left -= before
        total -= rate
    return counts


def epoch_size(sizes: Sequence[int], weights: Sequence[float] | None, exhaust: str) -> int | None:
    """Return the number of positions of an epoch; None if the epoch has no end.

    Without weights, an epoch has every sequence once. With weights and `first`, it ends before the first position that
    would begin a second pass over a source; with `all`, it ends when every source is used up, and smaller ones repeat.

    Args:
        sizes: Sequences of each source.
        weights: `DataConfig.weights`.
        exhaust: `data.exhaust`.
    """
    if weights is None:
        return sum(sizes)
    if exhaust == "repeat":
        return None
    rates = rates_of(weights)
    if exhaust == "first":
        return _first(lambda n: any(c > s for c, s in zip(counts_before(n + 1, rates), sizes, strict=True)))
    return _first(lambda n: all(c >= s for c, s in zip(counts_before(n, rates), sizes, strict=True)))


def _first(is_true: Callable[[int], bool]) -> int:
    """Return the first number for which a predicate is true; it must stay true for all larger numbers."""
    end = 1
    while not is_true(end):
        end *= 2
    return bisect_left(range(end + 1), True, key=is_true)
