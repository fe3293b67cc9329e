"""Turns the held-out rows into questions for a model, with the reference answers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from dist_ft.config import Config
from dist_ft.data.curation.personal import redact
from dist_ft.data.rows.scan import held_out_rows
from dist_ft.model.chat.render import Renderer
from dist_ft.records import Record


@dataclass(frozen=True)
class Question:
    """One held-out row.

    Attributes:
        prompt: Text that the model continues.
        reference: The answer that the row holds.
        shown: The question as a person would put it, without the template.
    """

    prompt: str
    reference: str
    shown: str


def held_out_questions(config: Config, renderer: Renderer) -> list[Question]:
    """Return the questions of the first `eval.max_rows` held-out rows that have one, in the order of the rows."""
    records = (redact(row.record, config.data.redact) for row in held_out_rows(config.data))
    found = (question for record in records if (question := question_of(record, renderer)))
    return list(islice(found, config.eval.max_rows))


def question_of(record: Record, renderer: Renderer) -> Question | None:
    """Return what a row asks; None for one that asks nothing, or whose answer says nothing."""
    asked = record.question()
    return Question(renderer.prompt(asked.record), asked.answer, asked.shown) if asked else None
