"""Finds bad losses and gradient norms. Pure; every rank decides alike, because every rank has the same sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

_LOSSES_TO_JUDGE = 20


def find_bad_numbers(
    loss: float, grad_norm: float, recent_losses: Sequence[float], spike_factor: float | None
) -> str | None:
    """Return what is wrong with the numbers of a step, or None.

    Args:
        loss: Mean loss per trained token.
        grad_norm: Norm of the gradient before clipping.
        recent_losses: Losses of the last steps; a spike is only found among at least 20.
        spike_factor: `failure.spike_factor`.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"loss {loss}, gradient norm {grad_norm}"
    if spike_factor is None or len(recent_losses) < _LOSSES_TO_JUDGE:
        return None
    usual = median(recent_losses)
    if loss > spike_factor * usual:
        return f"loss {loss:.4g} is more than failure.spike_factor={spike_factor:g} times the median {usual:.4g}"
    return None
