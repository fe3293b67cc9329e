"""The held-out rows as questions: what a model is asked, what it should answer, what a person is shown."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from dist_ft.config import Config
from dist_ft.data.curation.personal import redact
from dist_ft.data.rows.scan import held_out_rows
from dist_ft.model.chat.render import Renderer
from dist_ft.records import Completion, Conversation, Record


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
    """Returns the questions of the first `eval.max_rows` held-out rows that have one, in the order of the rows."""
    records = (redact(row.record, config.data.redact) for row in held_out_rows(config.data))
    found = (question for record in records if (question := _question(record, renderer)))
    return list(islice(found, config.eval.max_rows))


def _question(record: Record, renderer: Renderer) -> Question | None:
    """Returns what a row asks; None for one without: plain text, or a last answer that says nothing (a tool call)."""
    if isinstance(record, Completion):
        return Question(renderer.prompt(record), record.completion, record.prompt) if record.prompt else None
    last = max((i for i, message in enumerate(record.messages) if message["role"] == "assistant"), default=None)
    if last is None or not record.messages[last]["content"].strip():
        return None
    messages = record.messages[: last + 1]
    asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    return Question(renderer.prompt(Conversation(messages, record.tools)), messages[-1]["content"], asked)
