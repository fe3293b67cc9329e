"""What a chat template expects of messages where stock templates differ, found out by trying it.

The renderer's records are all alike (`records.Message`); this module spells them as a template wants them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dist_ft.model.chat.sandbox import Template
from dist_ft.records import Message

_WORD = "probe0word"


@dataclass(frozen=True)
class Dialect:
    """How one template wants its messages.

    Attributes:
        knows_developer: Has a meaning of its own for the role `developer`; others get `system`.
        content_as_parts: Wants `[{"type": "text", "text": ...}]`, as templates of vision models do.
        arguments_as_text: Wants the arguments of tool calls as JSON text.
    """

    knows_developer: bool = True
    content_as_parts: bool = False
    arguments_as_text: bool = False

    def spell(self, message: Message) -> Message:
        """Returns the message for the template, without what is not for it and without empty keys."""
        spelt = {key: value for key, value in message.items() if value is not None and key != "weight"}
        if message["role"] == "developer" and not self.knows_developer:
            spelt["role"] = "system"
        if self.content_as_parts:
            spelt["content"] = [{"type": "text", "text": message["content"]}]
        if "reasoning_content" in spelt:
            spelt.setdefault("thinking", spelt["reasoning_content"])  # gpt-oss; transformers does the same
        if "tool_calls" in spelt and self.arguments_as_text:
            spelt["tool_calls"] = [_with_text_arguments(call) for call in spelt["tool_calls"]]
        return spelt


def find_dialect(template: Template) -> Dialect:
    """Tries a template on a short conversation in each spelling."""
    in_parts = _try(template, Dialect(content_as_parts=True))
    # In quotes it is the list itself that was written.
    understood = _WORD in in_parts and f"'{_WORD}'" not in in_parts and f'"{_WORD}"' not in in_parts
    parts = understood and _WORD not in _try(template, Dialect())
    plain = Dialect("developer" in template.source, parts)
    as_text = Dialect(plain.knows_developer, parts, arguments_as_text=True)
    # A template that joins arguments to text fails on an object, or writes it as Python does, in single quotes.
    arguments = f'{{"{_WORD}"'
    text = arguments not in _try_call(template, plain) and arguments in _try_call(template, as_text)
    return as_text if text else plain


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _try(template: Template, dialect: Dialect) -> str:
    return _render(template, dialect, [{"role": "user", "content": _WORD}])


def _try_call(template: Template, dialect: Dialect) -> str:
    function = {"name": "probe", "arguments": {_WORD: 1}}
    call = {"id": "probe0000", "type": "function", "function": function}
    turns: list[Message] = [
        {"role": "user", "content": "probe"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return _render(template, dialect, turns)


def _render(template: Template, dialect: Dialect, turns: list[Message]) -> str:
    try:
        return template.render([dialect.spell(turn) for turn in turns], [], False)
    except Exception:  # a template is a program: it can raise anything, and has then not understood
        return ""
