"""The texts of a record: by whom each is said, and a record with other texts in their place.

Owns which parts of a record are free text. Keys, roles, weights and the order of turns are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import xxhash

from dist_ft.records import Completion, Conversation, Message, Record

_INSTRUCTING = ("system", "developer")
_SPOKEN = ("content", "reasoning_content")


def role_texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yields (role, text) of all that is said; the arguments of tool calls as JSON. A prompt counts as the user's."""
    if isinstance(record, Completion):
        yield from ((role, text) for role, text in (("user", record.prompt), ("assistant", record.completion)) if text)
        return
    for message in record.messages:
        yield from ((message["role"], text) for text in _message_texts(message))


def compared_text(record: Record) -> str:
    """Returns what near copies are found by: all that is said but instructions, which many rows share."""
    return "\n".join(text for role, text in role_texts(record) if role not in _INSTRUCTING)


def answer_text(record: Record) -> str:
    """Returns the text of the last assistant turn, or what follows a prompt; empty for plain text without one."""
    if isinstance(record, Completion):
        return record.completion if record.prompt else ""
    answers = [message for message in record.messages if message["role"] == "assistant"]
    return "\n".join(_message_texts(answers[-1])) if answers else ""


def map_texts(record: Record, change: Callable[[str], str]) -> Record:
    """Returns the record with every text changed, turn by turn, so that what is trained stays what is trained."""
    if isinstance(record, Completion):
        return Completion(change(record.prompt), change(record.completion))
    messages = [_map_message(message, change) for message in record.messages]
    return replace(record, messages=messages, tools=tuple(_map_nested(tool, change) for tool in record.tools))


def record_key(record: Record) -> int:
    """Returns a 64-bit hash of what a record says, equal whatever the order of keys and the columns beside it."""
    return int(xxhash.xxh3_64_intdigest(json.dumps(asdict(record), sort_keys=True).encode()))


def num_turns(record: Record) -> int:
    """Returns the turns of a conversation; 0 for raw text."""
    return len(record.messages) if isinstance(record, Conversation) else 0


def _message_texts(message: Message) -> Iterator[str]:
    yield from (message[key] for key in _SPOKEN if message.get(key))
    for call in message.get("tool_calls") or ():
        yield json.dumps(call.get("function", {}).get("arguments"), ensure_ascii=False, default=str)


def _map_message(message: Message, change: Callable[[str], str]) -> Message:
    changed: Message = {key: change(message[key]) for key in _SPOKEN if message.get(key)}
    if message.get("tool_calls"):
        changed["tool_calls"] = [_map_call(call, change) for call in message["tool_calls"]]
    return {**message, **changed}


def _map_call(call: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    function = call.get("function", {})
    if "arguments" not in function:
        return call
    return {**call, "function": {**function, "arguments": _map_nested(function["arguments"], change)}}


def _map_nested(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_nested(item, change) for key, item in value.items()}
    return [_map_nested(item, change) for item in value] if isinstance(value, list) else value
