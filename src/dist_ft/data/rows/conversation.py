"""Reads the turns of a conversation, in any known spelling, as `records.Message`s. Pure.

OpenAI's `role` and `content` and ShareGPT's `from` and `value` mean the same. Null counts as a missing key, because
columnar files fill in nulls. Nothing is guessed: an unknown form is an error that names the turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import ROLES, Message, ToolCall

_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's roles of a turn that calls a function; its text is the call as JSON."""
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking")


def read_turns(key: str, value: Any) -> list[Message]:
    """Returns the turns under a row's key, which is a list or, in CSV and Parquet files, the list as JSON."""
    turns = _from_json(value, f"`{key}`") if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise DataError(f"`{key}` is {excerpt(value)}, expected a list of turns")
    return [_read_turn(number, turn) for number, turn in enumerate(turns)]


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Returns the definitions of the functions that the assistant may call, from a list or its JSON."""
    if value is None or value == "":
        return ()
    tools = _from_json(value, "`tools`") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DataError(f"`tools` is {excerpt(value)}, expected a list of functions")
    found = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {number} is {excerpt(tool)}, expected a function with a name")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(found)


def with_system(system: Any, turns: list[Message]) -> list[Message]:
    """Returns the turns, with the row's own system prompt in front if it has one."""
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise DataError(f"`system` is {excerpt(system)}, expected text")
    if turns and turns[0]["role"] == "system":
        raise DataError("`system` and a system turn: two system prompts; remove one")
    return [{"role": "system", "content": system}, *turns]


def check_values(value: Any) -> None:
    """Refuses values that no template can write as text: surrogates, and numbers that are not finite.

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


def _read_turn(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is {excerpt(turn)}, expected an object with `role` and `content`")
    try:
        role, content = _either(turn, "role", "from"), _either(turn, "content", "value")
        if isinstance(role, str) and role.strip().lower() in _CALL_ROLES:
            return {"role": "assistant", "content": "", "tool_calls": _calls(_from_json(content, "the call"))}
        known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise DataError(f"the role is {excerpt(role)}, expected one of {', '.join(ROLES)}")
        return _plain_turn(known, content, turn)
    except DataError as error:
        raise DataError(f"turn {number}: {error}") from error


def _plain_turn(role: str, content: Any, turn: Mapping[str, Any]) -> Message:
    calls = _tool_calls(turn)
    if calls and role != "assistant":
        raise DataError(f"a turn of role {role} has `tool_calls`; only an assistant calls")
    message: Message = {"role": role, "content": _content(content, may_lack=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    if turn.get("name") is not None:
        message["name"] = _text("name", turn["name"])
    if turn.get("tool_call_id") is not None:
        message["tool_call_id"] = _text("tool_call_id", turn["tool_call_id"])
    reasoning = [turn[key] for key in _REASONING if turn.get(key)]
    if reasoning and role == "assistant":
        message["reasoning_content"] = _text("reasoning_content", reasoning[0])
    if (weight := _weight(turn.get("weight"), role)) is not None:
        message["weight"] = weight
    return message


def _either(turn: Mapping[str, Any], one: str, other: str) -> Any:
    """Returns the value under one of two spellings of a key."""
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
    return str(part["text"])


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{key}` is {excerpt(value)}, expected text")
    return value


def _weight(weight: Any, role: str) -> int | None:
    if weight is None:
        return None
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"`weight` is {excerpt(weight)}, expected 0 or 1")
    if role == "assistant":
        return int(weight)
    if weight:
        raise DataError(f"`weight` is 1 in a turn of role {role}; only assistant turns are trained")
    return None


def _tool_calls(turn: Mapping[str, Any]) -> list[ToolCall]:
    calls, legacy = turn.get("tool_calls"), turn.get("function_call")
    if calls and legacy:
        raise DataError("both `tool_calls` and `function_call` are given; keep `tool_calls`")
    if isinstance(calls, str):
        calls = _from_json(calls, "`tool_calls`")
    return _calls(calls or ([legacy] if legacy else []))


def _calls(value: Any) -> list[ToolCall]:
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` is {excerpt(value)}, expected a list of calls")
    return [_call(call) for call in calls]


def _call(call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a call is {excerpt(call)}, expected a function with name and arguments")
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str) and arguments:
        arguments = _from_json(arguments, f"arguments of {excerpt(name)}")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise DataError(f"arguments of {excerpt(name)} are {excerpt(arguments)}, expected an object")
    made: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    call_id = call.get("id")
    if call_id is None:
        return made
    if not isinstance(call_id, str):
        raise DataError(f"the id of a call is {excerpt(call_id)}, expected text")
    return {"id": call_id, **made}


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        raise DataError(f"{what} is {excerpt(value)}, expected text")
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{what}: {excerpt(value)} is not valid JSON ({error})") from error


def assistant_turns(messages: Sequence[Message]) -> list[Message]:
    """Returns the turns on which a model is trained."""
    return [message for message in messages if message["role"] == "assistant"]
