"""Computes how long to train between two checkpoints, from what one costs and how often the run fails. Pure.

Young, "A first order approximation to the optimum checkpoint interval" (CACM 17(9), 1974): sqrt(2 C M). Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps" (FGCS 22, 2006), equation 37, adds the terms that
count where a checkpoint costs a good part of the time between failures.
"""

from __future__ import annotations

import math

PRIOR_S = 86_400.0
"""Time after which the first failure is expected while none was seen: a day of the whole run, which is short for a few
machines and long for spot machines; the failures that are seen soon outweigh it."""


def mean_time_between_failures_s(active_s: float, num_failures: int) -> float:
    """Return the expected seconds between failures: what was seen, and the prior as one failure in a day.

    Args:
        active_s: Seconds that the run was at work.
        num_failures: Failures meanwhile.
    """
    return (PRIOR_S + max(0.0, active_s)) / (1 + num_failures)


def optimal_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Return the seconds of training between two checkpoints that lose the least time (Daly 2006, equation 37).

    Args:
        cost_s: Seconds of training that one checkpoint costs, more than 0.
        mtbf_s: Mean time between failures.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - cost_s
