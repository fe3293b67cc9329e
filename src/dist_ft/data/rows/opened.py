"""Opens a row: JSON text that stands where an object or a list belongs becomes that object or list. Pure.

CSV cells, text columns of Parquet files and the `Json` type of the `datasets` library hold turns, tools, parts and
calls as text. So the readers, and the walk over unread keys, see one form of a row. Text that does not hold what
belongs there stays as it is, and its reader says so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from dist_ft.data.rows.keys import CALL, FUNCTION, PART, ROW, TURN, lost_keys
from dist_ft.data.rows.record_kind import CHOSEN_KEYS, REJECTED_KEYS
from dist_ft.data.sources.strict_json import parse_json

_CONVERSATIONS = ("messages", "conversations")
_PLAIN = frozenset(("role", "content", "from", "value"))
"""Keys of the most common turns, in which nothing has to be opened where the content is text."""
_TURN_LISTS = (*_CONVERSATIONS, "prompt", "completion", *CHOSEN_KEYS, *REJECTED_KEYS)
"""Keys of a row that may hold turns. Under the first two, text is always a list as JSON; under the others it may be
what is said."""


def opened(row: Mapping[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return a row without JSON text in the place of objects, and without ignored keys at every level.

    Args:
        row: The row, with the keys of a format.
        ignored: `data.train[].ignore`.
    """
    made = {key: value for key, value in row.items() if key not in ignored}
    for key in _CONVERSATIONS:
        if key in made:
            made[key] = _parsed(made[key], list)
    for key in _TURN_LISTS:
        if key in made:
            made[key] = _turns(made[key], ignored)
    for key in ("tools", "functions"):
        if key in made:
            made[key] = _each(_parsed(made[key], list), _tool)
    if "input" in made and isinstance(asked := made["input"], dict):  # OpenAI's preferences
        made["input"] = opened(asked, ignored)
    return made


def turns_of(row: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the turns of an opened row, under whatever key they stand."""
    for key in _TURN_LISTS:
        value = row.get(key)
        yield from value if isinstance(value, list) else [value] if isinstance(value, dict) else ()
    if isinstance(asked := row.get("input"), dict):
        yield from turns_of(asked)


def unread_in(row: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys of an opened row, and of what is in it, that nothing reads, as `foo of a turn`."""
    found = {*ROW.unread(row), *lost_keys(row)}
    if isinstance(asked := row.get("input"), dict):
        found.update(ROW.unread(asked))
    for turn in turns_of(row):
        if not isinstance(turn, dict):
            continue
        if turn.keys() <= _PLAIN and not any(isinstance(value, list) for value in turn.values()):
            continue
        found.update(TURN.unread(turn))
        for content in (turn.get("content"), turn.get("value")):
            for part in content if isinstance(content, list) else ():
                found.update(PART.unread(part) if isinstance(part, dict) else ())
        calls = turn.get("tool_calls")
        for call in (*(calls if isinstance(calls, list) else ()), turn.get("function_call")):
            if isinstance(call, dict):
                found.update(CALL.unread(call))
                function = call.get("function")
                found.update(FUNCTION.unread(function) if isinstance(function, dict) else ())
    return frozenset(found)


def _turns(value: Any, ignored: Collection[str]) -> Any:
    if isinstance(value, dict):
        return _turn(value, ignored)
    return _each(value, lambda turn: _turn(turn, ignored))


def _turn(turn: Any, ignored: Collection[str]) -> Any:
    turn = _parsed(turn, dict)
    if not isinstance(turn, dict):
        return turn
    if not ignored and turn.keys() <= _PLAIN and not any(isinstance(value, list) for value in turn.values()):
        return turn
    made = _without(turn, ignored)
    for key in ("content", "value"):
        if isinstance(made.get(key), list):
            made[key] = [_without(_part(part), ignored) for part in made[key]]
    if "tool_calls" in made:
        made["tool_calls"] = _each(_parsed(made["tool_calls"], list), lambda call: _call(call, ignored))
    if "function_call" in made:
        made["function_call"] = _call(made["function_call"], ignored)
    return made


def _part(part: Any) -> Any:
    """Return a part of a content; text is a part of its own unless it is an object with a type."""
    found = _parsed(part, dict)
    return found if isinstance(found, dict) and "type" in found else part


def _call(call: Any, ignored: Collection[str]) -> Any:
    call = _without(_parsed(call, dict), ignored)
    if isinstance(call, dict) and "function" in call:
        call["function"] = _without(_parsed(call["function"], dict), ignored)
    return call


def _tool(tool: Any) -> Any:
    tool = _parsed(tool, dict)
    if not isinstance(tool, dict):
        return tool
    if "function" in tool:
        return {**tool, "function": _function(_parsed(tool["function"], dict))}
    return _function(tool)


def _function(function: Any) -> Any:
    if not isinstance(function, dict) or "parameters" not in function:
        return function
    return {**function, "parameters": _schema(function["parameters"])}


def _schema(schema: Any) -> Any:
    """Return a JSON schema; objects in it, which differ from row to row, may stand as text."""
    schema = _parsed(schema, dict)
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if "properties" in made:
        properties = _parsed(made["properties"], dict)
        is_object = isinstance(properties, dict)
        made["properties"] = {key: _schema(value) for key, value in properties.items()} if is_object else properties
    if "items" in made:
        made["items"] = _schema(made["items"])
    return made


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(inner) for inner in value] if isinstance(value, list) else value


def _without(value: Any, ignored: Collection[str]) -> Any:
    return {key: inner for key, inner in value.items() if key not in ignored} if isinstance(value, dict) else value


def _parsed(value: Any, kind: type) -> Any:
    """Return what JSON text holds if it is of a kind; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = parse_json(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, kind) else value
