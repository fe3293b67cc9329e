"""Finds what a chat template has left out: such a row would teach something else than it says.

White space does not count, nor whether a text is written plainly or as a JSON string: templates trim and quote.
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
    """Checks that every turn which is no answer, and every tool, occurs in the text.

    Raises:
        DataError: One does not.
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
    """Checks that the trained text of an answer holds its content, its reasoning included, and its tool calls.

    Raises:
        DataError: It does not.
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
    squeezed = _squeeze(text)
    return any(_squeeze(form) in squeezed for form in (part, json.dumps(part, ensure_ascii=False)[1:-1]))


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text.strip()[:60])
