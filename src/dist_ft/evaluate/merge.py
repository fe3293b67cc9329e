"""Merges the results of evaluation tasks and scores the answers. Torch-free, for driver and command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.config.training_sections import EvalConfig
from dist_ft.evaluate.metrics import score
from dist_ft.metric_rows import Metrics

_SAMPLES_KEPT = 20
_SAMPLE_CHARS = 2000


@dataclass(frozen=True)
class AnsweredRow:
    """A held-out row, and what the models answer.

    Attributes:
        row: Its number among the questions.
        prompt: The question, as a person would put it.
        reference: The answer that the row holds.
        answers: Name of the model → its answer.
    """

    row: int
    prompt: str
    reference: str
    answers: dict[str, str]

    def shown(self) -> dict[str, str]:
        """Return the beginning of each text by the name that a person sees."""
        texts = {"prompt": self.prompt, "reference": self.reference, **self.answers}
        return {name: text[:_SAMPLE_CHARS] for name, text in texts.items()}


@dataclass(frozen=True)
class EvalShare:
    """What one evaluation task found.

    Attributes:
        rows: The rows of its share.
        numbers: Name of the model → held-out loss and the like, where they were asked for.
        eval_s: Seconds that it took.
    """

    rows: tuple[AnsweredRow, ...]
    numbers: dict[str, Metrics]
    eval_s: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvalShare:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        return cls(tuple(AnsweredRow(**row) for row in data["rows"]), data["numbers"], data["eval_s"])


@dataclass(frozen=True)
class Evaluation:
    """The numbers of several models on the same rows. `eval --json` prints it field by field.

    Attributes:
        models: Name of the model → its numbers.
        num_rows: Rows that were asked.
        samples: The first of them, each text cut: question, reference and answers by name.
        eval_s: Seconds of the longest task.
    """

    models: dict[str, Metrics]
    num_rows: int
    samples: tuple[dict[str, str], ...]
    eval_s: float


def merge(config: EvalConfig, names: Iterable[str], shares: Sequence[EvalShare]) -> Evaluation:
    """Merge the answers in the order of the rows, and score them.

    Args:
        config: Says which metrics.
        names: Names of the models.
        shares: What each task found.
    """
    rows = sorted((row for share in shares for row in share.rows), key=lambda row: row.row)
    references = [row.reference for row in rows]
    numbers = {name: value for share in shares for name, value in share.numbers.items()}
    models = {}
    for name in names:
        judged = score(config.metrics, config.regex, [row.answers[name] for row in rows], references)
        models[name] = {**numbers.get(name, {}), **judged}
    samples = tuple(row.shown() for row in rows[:_SAMPLES_KEPT])
    return Evaluation(models, len(rows), samples, max(share.eval_s for share in shares))
