"""Reads the turns of a conversation, in any known spelling, as `records.Message`s. Pure.

OpenAI's `role` and `content` and ShareGPT's `from` and `value` mean the same. Null counts as a missing key, because
columnar files fill in nulls. Nothing is guessed: an unknown form is an error that names the turn.

Some tools write each call in a turn of its own. A model writes all of them in one answer, which ends once; so do the
turns that are read here: what an assistant says and the calls that follow at once are one turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.data.rows.flags import read_weight
from dist_ft.data.rows.keys import PART, REASONING_KEYS, TURN
from dist_ft.data.rows.tool_calls import from_json, read_calls
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import ROLES, Message

_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of a turn that calls functions; its content is the call as JSON."""
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(key: str, value: Any) -> list[Message]:
    """Return the turns under a row's key, which is a list or, in CSV and Parquet files, the list as JSON."""
    turns = from_json(value, f"`{key}`") if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise DataError(f"`{key}` is {excerpt(value)}, expected a list of turns")
    made: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"turn {number} is {excerpt(turn)}, expected an object with `role` and `content`")
        try:
            message = _read_turn(turn)
            if made and _continues(made[-1], message):
                made[-1] = _joined(made[-1], message)
            else:
                made.append(message)
        except DataError as error:
            raise DataError(f"turn {number}: {error}") from error
    return made


def with_system(system: Any, turns: list[Message]) -> list[Message]:
    """Return the turns, with the row's own system prompt in front if it has one."""
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise DataError(f"`system` is {excerpt(system)}, expected text")
    if turns and turns[0]["role"] == "system":
        raise DataError("`system` and a system turn: two system prompts; remove one")
    return [{"role": "system", "content": system}, *turns]


def assistant_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the turns on which a model is trained."""
    return [message for message in messages if message["role"] == "assistant"]


def check_values(value: Any) -> None:
    """Refuses values that no template can write as text: surrogates, numbers that are not finite, dates, bytes.

    Raises:
        DataError: With the text around it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            around = value[max(0, error.start - 10) : error.start + 10]
            raise DataError(f"{excerpt(around)} holds half a character ({error.reason}); remove or mend it") from error
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{value} is no number that JSON knows; remove it or write null")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_values(key)
            check_values(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_values(inner)
    elif value is not None and not isinstance(value, int | float):
        raise DataError(f"{excerpt(value)} is no value that JSON knows; write it as text")


def _read_turn(turn: Mapping[str, Any]) -> Message:
    TURN.check(turn)
    given, content = _either(turn, "role", "from"), _either(turn, "content", "value")
    name = given.strip().lower() if isinstance(given, str) else ""
    is_call = name in _CALL_ROLES
    role = "assistant" if is_call else _ROLES.get(name)
    if role is None:
        raise DataError(f"the role is {excerpt(given)}, expected one of {', '.join(ROLES)}")
    calls = read_calls(turn, content, is_call)
    if calls and role != "assistant":
        raise DataError(f"a turn of role {role} has `tool_calls`; only an assistant calls")
    text = "" if is_call else _content(content, may_lack=bool(calls))
    message: Message = {"role": role, "content": text}
    if calls:
        message["tool_calls"] = calls
    if turn.get("name") is not None and not (is_call and turn["name"] == calls[0]["function"]["name"]):
        message["name"] = _text("name", turn["name"])
    if turn.get("tool_call_id") is not None and not is_call:
        message["tool_call_id"] = _text("tool_call_id", turn["tool_call_id"])
    if reasoning := _reasoning(turn, role):
        message["reasoning_content"] = reasoning
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) and not is_call else []
    if (weight := read_weight(turn, role, parts, text)) is not None:
        message["weight"] = weight
    return message


def _continues(before: Message, message: Message) -> bool:
    """Return whether a turn only calls, right behind what the same assistant says or call."""
    says = message["content"] or message.get("reasoning_content")
    is_same = before["role"] == message["role"] == "assistant" and message.get("name") in (None, before.get("name"))
    return is_same and bool(message.get("tool_calls")) and not says


def _joined(before: Message, calls: Message) -> Message:
    if before.get("weight", 1) != calls.get("weight", 1):
        raise DataError(
            "the calls and what the assistant says right before them are one turn, but only one of them is trained; "
            "give both the same `weight`"
        )
    return {**before, "tool_calls": [*before.get("tool_calls", []), *calls["tool_calls"]]}


def _either(turn: Mapping[str, Any], one: str, other: str) -> Any:
    """Return the value under one of two spellings of a key."""
    values = [turn[key] for key in (one, other) if turn.get(key) is not None]
    if len(values) == 2:
        raise DataError(f"both `{one}` and `{other}` are given; keep one")
    return values[0] if values else None


def _content(content: Any, may_lack: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        return "".join(map(_part, content))
    raise DataError(f"the content is {excerpt(content)}, expected text")


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        raise DataError(f"the content has a part {excerpt(part)}; only text can be trained")
    PART.check(part)
    return str(part["text"])


def _reasoning(turn: Mapping[str, Any], role: str) -> str | None:
    given = {key: turn[key] for key in REASONING_KEYS if turn.get(key)}
    if not given:
        if turn.get("reasoning_details"):
            raise DataError("`reasoning_details` is not read; write the reasoning as text under `reasoning_content`")
        return None
    texts = {_text(key, value) for key, value in given.items()}
    if role != "assistant":
        raise DataError(f"a turn of role {role} has `{next(iter(given))}`; only an assistant reasons")
    if len(texts) > 1:
        raise DataError(f"{' and '.join(f'`{key}`' for key in given)} differ; keep `reasoning_content`")
    return texts.pop()


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{key}` is {excerpt(value)}, expected text")
    return value
