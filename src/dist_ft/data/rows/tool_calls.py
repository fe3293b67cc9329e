"""Reads the functions that an assistant may call, and its calls, in any known spelling. Pure.

OpenAI's `arguments` and Llama 3.1's `parameters` of a call mean the same. A call without either is an error: a default
would teach a call without arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.data.rows.keys import CALL, FUNCTION
from dist_ft.data.sources.strict_json import parse_json
from dist_ft.errors import DataError
from dist_ft.printable import excerpt
from dist_ft.records import ToolCall

_ARGUMENTS = ("arguments", "parameters")
_CALL_TYPES = ("function", "tool_call", "function_call", "tool_use")


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the definitions of the functions that the assistant may call, from a list or its JSON."""
    if row.get("tools") and row.get("functions"):
        raise DataError("both `tools` and `functions` are given; keep `tools`")
    value = row.get("tools") or row.get("functions")
    if not value:
        return ()
    tools = from_json(value, "`tools`") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise DataError(f"`tools` is {excerpt(value)}, expected a list of functions")
    found = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"tool {number} is {excerpt(tool)}, expected a function with a name")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(found)


def read_calls(turn: Mapping[str, Any], content: Any, is_call: bool) -> list[ToolCall]:
    """Return the calls that a turn makes.

    Args:
        turn: The turn.
        content: Its content.
        is_call: Whether the turn has a role of calls, so that its content is a call, or several, or their JSON.
    """
    calls, legacy = turn.get("tool_calls"), turn.get("function_call")
    if calls and legacy:
        raise DataError("both `tool_calls` and `function_call` are given; keep `tool_calls`")
    if is_call and content:
        if calls or legacy:
            raise DataError("both the content and `tool_calls` are calls; keep one")
        calls = from_json(content, "the call") if isinstance(content, str) else content
        calls = [calls] if isinstance(calls, dict) else calls
    calls = (
        from_json(calls, "`tool_calls`") if isinstance(calls, str) and calls else calls or ([legacy] if legacy else [])
    )
    if not isinstance(calls, list):
        raise DataError(f"`tool_calls` is {excerpt(calls)}, expected a list of calls")
    made = [_call(call) for call in calls]
    if is_call and not made:
        raise DataError(f"the call is {excerpt(content)}, expected a function with name and arguments")
    if is_call and len(made) == 1 and isinstance(call_id := turn.get("tool_call_id"), str):
        made[0].setdefault("id", call_id)
    return made


def _call(call: Any) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"a call is {excerpt(call)}, expected a function with name and arguments")
    if not function["name"].strip():
        raise DataError(f"a call is {excerpt(call)}, in which the name of the function is empty")
    CALL.check(call)
    if function is not call:
        if call.get("name") not in (None, "", function["name"]):
            raise DataError(f"a call has two names, {excerpt(call['name'])} and {excerpt(function['name'])}; keep one")
        FUNCTION.check(function)
        if stray := [key for key in _ARGUMENTS if call.get(key) is not None]:
            raise DataError(
                f"`{stray[0]}` stands beside `function` in a call of {excerpt(function['name'])}; move it inside"
            )
    if call.get("type") not in (None, *_CALL_TYPES):
        raise DataError(f"a call is of type {excerpt(call['type'])}, expected function")
    made: ToolCall = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}
    call_id = call.get("id")
    if call_id is None:
        return made
    if not isinstance(call_id, str):
        raise DataError(f"the id of a call is {excerpt(call_id)}, expected text")
    return {"id": call_id, **made}


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a called function; empty text, as OpenAI writes it, stands for none."""
    name, given = excerpt(function["name"]), [key for key in _ARGUMENTS if function.get(key) is not None]
    if not given:
        keys = ", ".join(sorted(map(str, function.keys() - {"name"}))) or "nothing else"
        raise DataError(f"the call of {name} has no `arguments` (found {keys}); write {{}} for none")
    found = [_object(function[key], name) for key in given]
    if any(other != found[0] for other in found):
        raise DataError(f"`arguments` and `parameters` of {name} differ; keep `arguments`")
    return found[0]


def _object(arguments: Any, name: str) -> dict[str, Any]:
    if arguments == "":
        return {}
    if isinstance(arguments, str):
        arguments = from_json(arguments, f"arguments of {name}")
    if not isinstance(arguments, dict):
        raise DataError(f"arguments of {name} are {excerpt(arguments)}, expected an object")
    return arguments


def from_json(value: Any, what: str) -> Any:
    """Return what JSON text holds.

    Args:
        value: The text.
        what: Its name in messages.
    """
    if not isinstance(value, str):
        raise DataError(f"{what} is {excerpt(value)}, expected text")
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataError(f"{what}: {excerpt(value)} is not valid JSON ({error})") from error
