"""Finds the calls of functions in an answer: Hermes' and Qwen's tags, Mistral's list, Llama's JSON. Pure.

The text of a call comes at once, when it is whole; text before it is passed on as it comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dist_ft.engine.transcript import num_held

_TAG, _LIST, _PYTHON = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
_MARKS = (_TAG, _LIST, _PYTHON)
_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: The function.
        arguments: JSON text of an object.
    """

    name: str
    arguments: str


class CallReader:
    """Splits an answer into text and calls.

    Args:
        names: Functions that may be called; with none, everything is text.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._begun = self._is_call = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take a piece; return what is certainly no call."""
        if not self._names:
            return text
        self._held += text
        if self._is_call:
            return ""
        begin = self._held.lstrip()
        if not self._begun and (not begin or begin[0] == "{"):
            return ""
        found = [at for mark in _MARKS if (at := self._held.find(mark)) >= 0]
        self._is_call = bool(found)
        free = min(found) if found else len(self._held) - num_held(self._held, _MARKS)
        passed, self._held = self._held[:free], self._held[free:]
        self._begun = self._begun or bool(passed.strip())
        return passed

    def finish(self) -> tuple[str, list[Call]]:
        """Return the text that was held, and the calls. Of what is no whole call the text is returned."""
        calls = read_calls(self._held, self._names) if self._names else []
        return ("", calls) if calls else (self._held, [])


def read_calls(text: str, names: frozenset[str]) -> list[Call]:
    """Return the calls that a text consists of; none if it is something else.

    Args:
        text: Begins with a mark of a call, or with JSON.
        names: Functions that may be called.
    """
    text = text.strip()
    try:
        if text.startswith(_TAG):
            values = [json.loads(part) for part in _TAGGED.findall(text)]
        elif text.startswith(_LIST):
            values = list(_of_mistral(text))
        else:
            values = list(_values(text.removeprefix(_PYTHON)))
        values = [one for value in values for one in (value if isinstance(value, list) else [value])]
        calls = [_call(value) for value in values]
    except (ValueError, TypeError, KeyError):
        return []
    return calls if all(call.name in names for call in calls) else []


def _call(value: dict[str, object]) -> Call:
    arguments = value["arguments"] if "arguments" in value else value["parameters"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(arguments, dict):
        raise TypeError("arguments are an object")
    return Call(str(value["name"]), json.dumps(arguments, ensure_ascii=False))


def _of_mistral(text: str) -> Iterator[object]:
    for part in filter(str.strip, text.split(_LIST)):
        named = _NAMED.match(part)
        if named is None:
            yield from _values(part)
        else:
            for arguments in _values(part[named.end() :]):
                yield {"name": named[1], "arguments": arguments}


def _values(text: str) -> Iterator[object]:
    """Yield JSON values that follow one another, apart by white space, commas or semicolons."""
    at = 0
    while rest := text[at:].lstrip(" \n\r\t,;"):
        value, end = json.JSONDecoder().raw_decode(rest)
        yield value
        at = len(text) - len(rest) + end
