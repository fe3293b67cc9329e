"""Computes the learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from dist_ft.config.training_sections import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """Returns the learning rate of a step, counted from 0.

    Linear warm-up over `warmup_ratio` of the run, then constant, linear, or half a cosine (Loshchilov and
    Hutter 2016) down to `min_lr_ratio` of the peak.
    """
    warmup = math.ceil(schedule.warmup_ratio * max_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    progress = (step - warmup) / max(1, max_steps - warmup)
    shape = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)
