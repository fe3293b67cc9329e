"""Computes the learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from dist_ft.config.training_sections import ScheduleConfig

_INVERSE_SQRT_SCALE = 10_000  # where there is no warm-up, as in transformers


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, max_steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    The rate rises linearly over the warm-up, then follows the shape of `schedule.kind` down to `min_lr_ratio` of the
    peak. After the warm-up it equals that of transformers' schedulers; in it, transformers is one step behind and has
    a first step with a rate of zero.
    """
    warmup = schedule.warmup_steps
    if warmup is None:
        warmup = math.ceil(schedule.warmup_ratio * max_steps - 1e-9)  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind in ("constant", "constant_with_warmup"):
        return peak
    shape = _shape(schedule, step, warmup, max_steps)
    return peak * (schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * shape)


def _shape(schedule: ScheduleConfig, step: int, warmup: int, max_steps: int) -> float:
    """Return what the shape makes of the peak after the warm-up: from 1 down to 0."""
    progress = (step - warmup) / max(1, max_steps - warmup)
    match schedule.kind:
        case "linear":
            return 1 - progress
        case "polynomial":
            return math.pow(max(0.0, 1 - progress), schedule.power)
        case "inverse_sqrt":
            scale = warmup or _INVERSE_SQRT_SCALE
            return 1 / math.sqrt((step - warmup + scale) / scale)
        case "wsd":
            num_decay = math.ceil(schedule.decay_ratio * max_steps - 1e-9)
            decayed = min(1.0, max(0.0, (step - (max_steps - num_decay)) / num_decay))
            match schedule.decay_kind:
                case "linear":
                    return 1 - decayed
                case "cosine":
                    return (1 + math.cos(math.pi * decayed)) / 2
                case "1-sqrt":
                    return 1 - math.sqrt(decayed)
        case _:
            if schedule.num_cycles > 1:
                progress = 0.0 if progress == 0 else progress * schedule.num_cycles % 1 if progress < 1 else 1.0
            return (1 + math.cos(math.pi * progress)) / 2
