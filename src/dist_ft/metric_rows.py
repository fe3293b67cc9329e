"""The rows of metrics.jsonl and eval.jsonl: what rank 0 reports and every reader of a run gets.

`run/log.py` owns the files. A number that was not finite is null there, and None here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class StepRow:
    """One optimizer step.

    Attributes:
        step: Completed optimizer steps, this one included.
        attempt: Attempt that made the step.
        world_size: Ranks of that attempt.
        epoch: Epoch of the cursor after the step.
        position: Position of the cursor after the step.
        loss: Mean per trained token; None for a step whose update was left out.
        lr: Learning rate of the step.
        grad_norm: Norm of the whole gradient before clipping; None as for `loss`.
        trained_tokens: Tokens with a loss.
        tokens: All tokens without padding.
        tokens_per_s: Tokens a second.
        step_s: Seconds of the step.
        data_s: Of these, seconds spent waiting for data.
        digest: Digest of the samples of the step.
        goodput: Useful step time ÷ time at work, 0 to 1; None until the coordinator has added it.
        metrics: Further numbers of the objective, in the file under their own names.
    """

    step: int
    attempt: int
    world_size: int
    epoch: int
    position: int
    loss: float | None
    lr: float
    grad_norm: float | None
    trained_tokens: int
    tokens: int
    tokens_per_s: float
    step_s: float
    data_s: float
    digest: str
    goodput: float | None = None
    metrics: Metrics = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as it stands in the file."""
        own = {name: getattr(self, name) for name in _STEP_KEYS}
        if self.goodput is None:
            del own["goodput"]
        return {**own, **self.metrics}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> StepRow:
        """Inverse of `to_dict`.

        Raises:
            ValueError: Something is missing.
        """
        _check_keys(row, _STEP_KEYS[:-1])
        metrics = {name: value for name, value in row.items() if name not in _STEP_KEYS}
        return cls(**{name: row[name] for name in _STEP_KEYS if name in row}, metrics=metrics)


@dataclass(frozen=True)
class EvalRow:
    """What was measured of a model.

    Attributes:
        step: Completed optimizer steps; 0 is the base model.
        attempt: Attempt that measured; 0 where a task did.
        metrics: Number of each metric, such as `eval_loss`.
    """

    step: int
    attempt: int
    metrics: Metrics

    @property
    def eval_loss(self) -> float | None:
        """Mean held-out loss per trained token; None where it was not measured, or not finite."""
        return self.metrics.get("eval_loss")

    def to_dict(self) -> dict[str, Any]:
        """Return the row as it stands in the file."""
        return {"step": self.step, "attempt": self.attempt, **self.metrics}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> EvalRow:
        """Inverse of `to_dict`.

        Raises:
            ValueError: Something is missing.
        """
        _check_keys(row, ("step", "attempt"))
        metrics = {name: value for name, value in row.items() if name not in ("step", "attempt")}
        return cls(row["step"], row["attempt"], metrics)


def held_out_sets(rows: Iterable[EvalRow]) -> list[str]:
    """Return the name of each held-out set's loss, such as `orders/eval_loss`; none where a run has one set."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics if name.endswith("/eval_loss")))


_STEP_KEYS = tuple(item.name for item in fields(StepRow) if item.name != "metrics")


def _check_keys(row: dict[str, Any], wanted: tuple[str, ...]) -> None:
    missing = [key for key in wanted if key not in row]
    if missing:
        raise ValueError(f"a row without {', '.join(missing)}: {str(row)[:200]}")
