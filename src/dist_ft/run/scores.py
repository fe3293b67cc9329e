"""Which evaluation of a run is the best, and whether it is time to stop: pure rules over what was measured.

Ranks, coordinator and driver apply the same rules, each to the rows that it has, and so agree without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dist_ft.metric_rows import EvalRow

LOWER_IS_BETTER = {"eval_loss": True, "token_accuracy": False}
"""The numbers that a run can be steered by."""


@dataclass(frozen=True)
class Scores:
    """What a run has measured of one metric.

    Attributes:
        metric: A key of `LOWER_IS_BETTER`.
        values: Step → number; NaN where it was not finite.
    """

    metric: str
    values: Mapping[int, float]

    @classmethod
    def of(cls, rows: Iterable[EvalRow], metric: str, every_steps: int, last_step: int) -> Scores:
        """Takes the evaluations that count.

        The base model's (step 0) does not, nor does what an earlier, shorter run measured at its end: an undisturbed
        run would not have measured there.

        Args:
            rows: Rows of eval.jsonl, each step once.
            metric: A key of `LOWER_IS_BETTER`.
            every_steps: `eval.every_steps`.
            last_step: Steps of the whole run.
        """
        found = {row.step: _number(row.metrics.get(metric)) for row in rows}
        due = sorted(step for step in found if step > 0 and (step % every_steps == 0 or step == last_step))
        return cls(metric, {step: found[step] for step in due})

    def improvements(self, min_delta: float = 0.0) -> list[int]:
        """Returns the steps that were better, by more than `min_delta`, than the one named before.

        Whatever is measured later changes nothing of the list but its end. NaN is never better.
        """
        sign = -1.0 if LOWER_IS_BETTER[self.metric] else 1.0
        found: list[int] = []
        for step in sorted(self.values):
            value = self.values[step]
            if math.isfinite(value) and (not found or sign * (value - self.values[found[-1]]) > min_delta):
                found.append(step)
        return found

    def best(self, steps: Iterable[int] | None = None) -> int | None:
        """Returns the step with the best number, the first of equal ones; None when there is none.

        Args:
            steps: Choose among these; None is all.
        """
        known = self.values if steps is None else {step: self.values[step] for step in {*steps} & self.values.keys()}
        return next(reversed(Scores(self.metric, known).improvements()), None)

    def is_exhausted(self, patience: int, min_delta: float) -> bool:
        """Whether the last `patience` evaluations have brought no improvement."""
        last = next(reversed(self.improvements(min_delta)), 0)
        return sum(step > last for step in self.values) >= patience


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def perplexity(loss_mean: float) -> float | None:
    """Returns exp(loss); None where that is more than a float holds, for which JSON has no word."""
    try:
        value = math.exp(loss_mean)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None
