"""Refuses rows of which a chat template leaves something out: they would teach something else than they say.

White space does not count, and a text may stand there plainly or as a JSON string: templates trim and quote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from dist_ft.errors import DataError
from dist_ft.records import Message

_THOUGHT = re.compile("</?think>")
_ADVICE = "remove it from the row or set another data.chat_template"


def check_context(text: str, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
    """Checks that the text holds every turn that is not an answer, and every tool.

    Raises:
        DataError: One is missing.
    """
    at = 0
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] == "assistant" or not content:
            continue
        found = text.find(content, at)  # turns stand in order, save where a template merges some
        at = max(at, found)
        if found < 0 and not _holds(text, content):
            raise DataError(
                f"the chat template leaves out turn {number} ({message['role']}): {_short(content)} is not in its "
                f"text; {_ADVICE}"
            )
    for tool in tools:
        name = str(tool.get("function", tool).get("name", ""))
        if name not in text:
            raise DataError(f"the chat template leaves out the tools: {name!r} is not in its text; {_ADVICE}")


def check_answer(text: str, number: int, message: Message) -> None:
    """Checks that the trained text of an answer holds its content, its reasoning and its tool calls.

    Raises:
        DataError: One of them is missing.
    """
    content = message["content"].strip()
    if content not in text:
        for piece in _THOUGHT.split(content):
            if not _holds(text, piece):
                raise DataError(
                    f"the chat template leaves out a part of the answer in turn {number}: {_short(piece)}; {_ADVICE}"
                )
    for call in message.get("tool_calls") or ():
        name = str(call["function"]["name"])
        if name not in text:
            raise DataError(f"the chat template leaves out the call of {name!r} in turn {number}; {_ADVICE}")


def _holds(text: str, part: str) -> bool:
    squeezed = "".join(text.split())
    return any("".join(form.split()) in squeezed for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _short(text: str) -> str:
    return repr(text.strip()[:60])
