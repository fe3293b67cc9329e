"""Defines the result of a run, which `dist-ft train` prints and a launcher finds in a job's output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from dist_ft import errors


class EarlyEnd(TypedDict):
    """Describes how early stopping ended a run."""

    metric: str
    best_step: int | None
    patience: int


@dataclass(frozen=True)
class RunNumbers:
    """Holds the numbers of a run so far; `RunResult` explains each of them."""

    final_loss: float | None = None
    eval_loss: float | None = None
    train_s: float | None = None
    comparison: dict[str, dict[str, float | None]] = field(default_factory=dict)
    early_stop: EarlyEnd | None = None
    export_dir: str | None = None
    best_step: int | None = None
    best_dir: str | None = None
    evaluation: dict[str, Any] | None = None

    def to_record(self) -> dict[str, Any]:
        """Return what run.json keeps as `result`; sample answers are only shown on the screen."""
        late = ("export_dir", "best_step", "best_dir", "evaluation")  # written once they are known
        kept = {name: value for name, value in vars(self).items() if value is not None or name not in late}
        if self.evaluation is not None:
            kept["evaluation"] = {key: value for key, value in self.evaluation.items() if key != "samples"}
        return kept


@dataclass
class RunResult:
    """Holds what `dist-ft train --json` prints.

    Attributes:
        run_dir: Path or URL of the run.
        state: completed, stopped or failed.
        steps: Completed steps.
        final_loss: Training loss of the last step.
        eval_loss: Held-out loss after the last step, if measured.
        export_dir: The exported model, if any.
        attempts: Attempts so far.
        error: `{type, message}` of a failed run.
        evaluation: An `Evaluation` as JSON values, if asked for.
        train_s: Seconds from the first step's start to the end of training in this attempt.
        comparison: Known metrics of the base model, the tuned model and the best one: name → metric → value.
        early_stop: `{metric, best_step, patience}` of a run that ended before its last step.
        best_step: Step of `exports/best`, if asked for.
        best_dir: Directory of `exports/best`.
    """

    run_dir: str
    state: str
    steps: int = 0
    final_loss: float | None = None
    eval_loss: float | None = None
    export_dir: str | None = None
    attempts: int = 0
    error: dict[str, str] | None = None
    evaluation: dict[str, Any] | None = None
    train_s: float | None = None
    comparison: dict[str, dict[str, float | None]] = field(default_factory=dict)
    early_stop: EarlyEnd | None = None
    best_step: int | None = None
    best_dir: str | None = None

    @classmethod
    def from_json(cls, line: str) -> RunResult:
        """Read a line that `dist-ft train --json` has printed; another version may have printed it.

        Raises:
            ValueError: The line is not the result of a run.
        """
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{key: value for key, value in json.loads(line).items() if key in known})
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{line[:100]!r} is not the result of a run") from error

    @property
    def exit_code(self) -> int:
        """Process exit code: 0 completed, 3 stopped, else the error's own."""
        if self.error is not None:
            return errors.from_dict(self.error).exit_code
        return {"completed": 0, "stopped": 3}.get(self.state, 1)
