"""Finds the best evaluation of a run, and whether early stopping is due. Pure functions of the measured rows.

Ranks, coordinator and driver apply the same rules to their own rows, and so agree without messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dist_ft.config.training_sections import EvalConfig, plain_metric
from dist_ft.metric_rows import EvalRow, Metrics

LOWER_IS_BETTER = {
    "eval_loss": True, "nll_loss": True, "rewards/rejected": True, "logps/rejected": True, "token_accuracy": False,
    "rewards/accuracies": False, "rewards/margins": False, "rewards/chosen": False, "logps/chosen": False,
    "kl": True, "agreement": False,
}  # fmt: skip
"""The metrics that can choose the best step and stop a run early."""


@dataclass(frozen=True)
class Scores:
    """Holds the values of one metric that a run has measured.

    Attributes:
        metric: A key of `LOWER_IS_BETTER`, or with the name of a held-out set before it.
        values: Step → number; NaN if it was not finite.
    """

    metric: str
    values: Mapping[int, float]

    @classmethod
    def of(cls, rows: Iterable[EvalRow], metric: str, every_steps: int, last_step: int) -> Scores:
        """Select the evaluations that count.

        The evaluation of the base model (step 0) does not count. Neither does one at the end of an earlier, shorter
        run, because an uninterrupted run would not have evaluated there.

        Args:
            rows: Rows of eval.jsonl, each step once.
            metric: See `Scores`.
            every_steps: `eval.every_steps`.
            last_step: Steps of the whole run.
        """
        found = {row.step: _number(row.metrics.get(metric)) for row in rows}
        due = sorted(step for step in found if step > 0 and (step % every_steps == 0 or step == last_step))
        return cls(metric, {step: found[step] for step in due})

    def improvements(self, min_delta: float = 0.0) -> list[int]:
        """Return the steps that improved on the previous step of the list by more than `min_delta`.

        Later measurements can only append to the list. NaN is never an improvement.
        """
        sign = -1.0 if LOWER_IS_BETTER[plain_metric(self.metric)] else 1.0
        found: list[int] = []
        for step in sorted(self.values):
            value = self.values[step]
            if math.isfinite(value) and (not found or sign * (value - self.values[found[-1]]) > min_delta):
                found.append(step)
        return found

    def best(self, steps: Iterable[int] | None = None) -> int | None:
        """Return the step with the best number, the first of equal ones; None when there is none.

        Args:
            steps: Steps to choose from; None means all.
        """
        known = self.values if steps is None else {step: self.values[step] for step in {*steps} & self.values.keys()}
        return next(reversed(Scores(self.metric, known).improvements()), None)

    def ranking(self) -> list[int]:
        """Return the steps with a number, the best first, the earlier first of equal ones."""
        sign = 1.0 if LOWER_IS_BETTER[plain_metric(self.metric)] else -1.0
        finite = (step for step, value in self.values.items() if math.isfinite(value))
        return sorted(finite, key=lambda step: (sign * self.values[step], step))

    def is_exhausted(self, patience: int, min_delta: float) -> bool:
        """Return whether the last `patience` evaluations brought no improvement."""
        last = next(reversed(self.improvements(min_delta)), 0)
        return sum(step > last for step in self.values) >= patience


def best_first(wanted: EvalConfig, rows: Callable[[], Iterable[EvalRow]], last_step: int) -> list[int]:
    """Return the measured steps, the best by `eval.best_metric` first; none if no metric chooses.

    Args:
        wanted: Section `eval` of the config.
        rows: Returns the rows of eval.jsonl, each step once; asked only if a metric chooses.
        last_step: Steps of the whole run.
    """
    if wanted.best_metric is None or wanted.every_steps is None:
        return []
    return Scores.of(rows(), wanted.best_metric, wanted.every_steps, last_step).ranking()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def perplexity(loss_mean: float) -> float | None:
    """Return exp(loss); None if it exceeds the range of a float, because JSON has no infinity."""
    try:
        value = math.exp(loss_mean)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


_FALL = 0.01
"""Share of the log-probability of the chosen answers by which it must fall to be worth a warning."""


def chosen_warning(first: Metrics, last: Metrics) -> str | None:
    """Return a warning where preference tuning made the chosen answers themselves less likely.

    A preference loss only asks for a margin, and may reach it by making both answers unlikely.

    Args:
        first: Held-out numbers before the first step.
        last: Held-out numbers now.
    """
    before, now = first.get("logps/chosen"), last.get("logps/chosen")
    if before is None or now is None or now >= before - _FALL * abs(before):
        return None
    return (
        f"the held-out chosen answers became less likely (logps/chosen {before:.2f} → {now:.2f}): the margin was "
        "gained by making both answers unlikely. Raise objective.sft_weight (0.1 to 1), or lower optimizer.lr"
    )
