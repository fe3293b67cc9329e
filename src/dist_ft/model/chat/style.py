"""Finds out what a chat template expects of messages, where stock templates differ, by trying it.

Records spell messages in one way (`records.Message`). This module formats them as a template wants them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from dist_ft.model.chat.sandbox import Template
from dist_ft.records import Message, ToolCall

_WORD = "probe0word"


@dataclass(frozen=True)
class TemplateStyle:
    """The form in which one template wants its messages.

    Attributes:
        knows_developer: The template has a meaning of its own for the role `developer`; others get `system`.
        content_as_parts: It wants `[{"type": "text", "text": ...}]`, as templates of vision models do.
        arguments_as_text: It wants the arguments of tool calls as JSON text.
    """

    knows_developer: bool = True
    content_as_parts: bool = False
    arguments_as_text: bool = False

    def format(self, message: Message) -> dict[str, Any]:
        """Return the message for the template, without keys that are empty or not meant for it."""
        formatted: dict[str, Any] = {
            key: value for key, value in message.items() if value is not None and key != "weight"
        }
        if message["role"] == "developer" and not self.knows_developer:
            formatted["role"] = "system"
        if self.content_as_parts:
            formatted["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in formatted:
            formatted.setdefault("thinking", formatted["reasoning_content"])  # gpt-oss; transformers does the same
        if "tool_calls" in formatted and self.arguments_as_text:
            calls = []
            for call in formatted["tool_calls"]:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                calls.append({**call, "function": {**call["function"], "arguments": arguments}})
            formatted["tool_calls"] = calls
        return formatted


def find_style(template: Template) -> TemplateStyle:
    """Render short conversations in each form and return the form that the template understands."""

    def render(style: TemplateStyle, turns: list[Message]) -> str:
        try:
            return template.render([style.format(turn) for turn in turns], [], False)
        except Exception:  # a template is a program: it can raise anything, and has then not understood
            return ""

    question: list[Message] = [{"role": "user", "content": _WORD}]
    in_parts = render(TemplateStyle(content_as_parts=True), question)
    # Between quotes, the template has written the list itself.
    is_understood = _WORD in in_parts and f"'{_WORD}'" not in in_parts and f'"{_WORD}"' not in in_parts
    parts = is_understood and _WORD not in render(TemplateStyle(), question)

    call: ToolCall = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": {_WORD: 1}}}
    with_call: list[Message] = [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    plain = TemplateStyle("developer" in template.source, parts)
    as_text = replace(plain, arguments_as_text=True)
    # A template that joins arguments to text fails on an object, or writes it as Python does, in single quotes.
    arguments = f'{{"{_WORD}"'
    wants_text = arguments not in render(plain, with_call) and arguments in render(as_text, with_call)
    return as_text if wants_text else plain
