"""What a held-out row asks, whatever kind of row it is."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dist_ft.evaluate.questions import Question, question_of
from dist_ft.model.chat.render import Renderer
from dist_ft.records import Completion, Conversation, Message, Record


class _Plain:
    """A renderer without a template."""

    def prompt(self, record: Record) -> str:
        if isinstance(record, Completion):
            return record.prompt
        return "|".join(message["content"] for message in record.messages[:-1])


def _turns(*turns: tuple[str, str], **last: Any) -> Conversation:
    messages: list[Message] = [{"role": role, "content": content} for role, content in turns]
    messages[-1] |= last
    return Conversation(messages)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {}}}


@pytest.mark.parametrize(
    ("record", "question"),
    [
        (_turns(("user", "a"), ("assistant", "b")), Question("a", "b", "a")),
        (
            _turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            Question("s|a|b|c", "d", "c"),
        ),
        (_turns(("user", "a"), ("assistant", "b"), ("user", "never answered")), Question("a", "b", "a")),
        (
            _turns(("user", "a"), ("assistant", ""), ("tool", "20 C"), ("assistant", "b")),
            Question("a||20 C", "b", "a"),
        ),
        (_turns(("user", "a"), ("assistant", ""), tool_calls=[CALL]), None),
        (_turns(("user", "a"), ("assistant", " \n")), None),
        (_turns(("user", "a")), None),
        (Completion("1 + 1 =", " 2"), Question("1 + 1 =", " 2", "1 + 1 =")),
        (Completion("", "plain text"), None),
    ],
)
def test_a_row_asks_for_its_last_answer(record: Record, question: Question | None) -> None:
    assert question_of(record, cast(Renderer, _Plain())) == question
