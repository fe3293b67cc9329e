"""Checks the lines of a file for fine-tuning and finds every fault with its line. Pure but for reading the file.

Three formats are known: chat, preference (for DPO) and prompt/completion; a file has one. A row that passes here is
also read by the readers of `data/rows`, so that what an upload accepts a run accepts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dist_ft.data.rows.conversation import check_values, read_turns
from dist_ft.data.rows.preferences import read_preference
from dist_ft.data.sources.strict_json import parse_json
from dist_ft.errors import DataError
from dist_ft.service.wire import Json, Object, shown

MAX_FAULTS = 1000
"""Faults that are kept with their lines; the others are counted."""
_MAX_LINE = 64 * 2**20
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MESSAGE_KEYS = (
    "role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal", "audio",
)  # fmt: skip
_ONLY = {
    "tool_calls": "assistant", "function_call": "assistant", "refusal": "assistant", "audio": "assistant",
    "tool_call_id": "tool",
}  # fmt: skip
"""Keys that messages of one role alone may have."""
_CHAT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")
_INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")
_BETTER, _WORSE = ("preferred_output", "preferred_completion"), ("non_preferred_output", "non_preferred_completion")
_UNKNOWN_FORMAT = "Unexpected file format, expected either prompt/completion pairs or chat messages."
_JSONL = "Expected file to have JSONL format, where every line is a JSON dictionary."


@dataclass(frozen=True)
class Fault:
    """What is wrong with a line; the first line is 1."""

    line: int
    message: str


@dataclass
class FileCheck:
    """What a check found.

    Attributes:
        format: `chat`, `preference` or `completion`; None where no line says.
        num_examples: Lines that hold an example.
        num_characters: Characters of all texts in the examples, names of roles included.
        num_faults: Faults, also those that were not kept.
        faults: The first of them.
    """

    format: str | None = None
    num_examples: int = 0
    num_characters: int = 0
    num_faults: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, line: int, message: str) -> None:
        """Add a fault."""
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(line, message))

    def describe(self) -> str | None:
        """Return all faults as text, one a line; None if there is none."""
        if not self.num_faults:
            return None
        lines = [f"Line {fault.line}: {fault.message}" for fault in self.faults]
        more = self.num_faults - len(self.faults)
        return "\n".join([*lines, *([f"and {more} more"] if more else [])])


class _FaultError(Exception):
    """Ends the check of a row."""


def check_file(path: Path) -> FileCheck:
    """Check every line of a file."""
    check = FileCheck()
    for number, line in _lines(path):
        if line is None:
            check.add(number, f"the line is longer than {_MAX_LINE >> 20} MB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = parse_json(text)
        except UnicodeDecodeError as error:
            check.add(number, f"the line is not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except (ValueError, RecursionError):
            check.add(number, f"{_JSONL} Line {number} is not a dictionary")
            continue
        if not isinstance(row, dict):
            check.add(number, f"{_JSONL} Line {number} is not a dictionary")
            continue
        _check_row(check, number, row)
        check.num_examples += 1
        check.num_characters += _text_length(row)
    if not check.num_examples and not check.num_faults:
        check.add(1, "the file holds no example")
    return check


def clean_row(row: Object) -> Object:
    """Return a row as the readers of `data/rows` take it: a refusal is what the assistant says, and no result is ""."""
    cleaned = dict(row)
    for key in ("messages", *_BETTER, *_WORSE):
        if isinstance(turns := row.get(key), list):
            cleaned[key] = [_clean_turn(turn) for turn in turns]
    if isinstance(given := row.get("input"), dict) and isinstance(turns := given.get("messages"), list):
        cleaned["input"] = {**given, "messages": [_clean_turn(turn) for turn in turns]}
    return cleaned


def write_clean(source: Path, target: Path) -> None:
    """Write the examples of a file that has passed the check as `clean_row` makes them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as file:
        for number, line in _lines(source):
            text = (line or b"").decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                file.write(json.dumps(clean_row(json.loads(text)), ensure_ascii=False) + "\n")


def _clean_turn(turn: Json) -> Json:
    if not isinstance(turn, dict):
        return turn
    kept = {key: value for key, value in turn.items() if key not in ("refusal", "audio")}
    if turn.get("refusal") and not turn.get("content"):
        kept["content"] = turn["refusal"]
    if turn.get("role") == "function" and turn.get("content") is None:
        kept["content"] = ""  # a function that returned nothing
    return kept


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line with its number; None in place of one that is too long to be held."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            is_long = len(line) > _MAX_LINE
            while is_long and not line.endswith(b"\n") and (line := file.readline(_MAX_LINE)):
                pass
            yield number, None if is_long else line.rstrip(b"\r\n")


def _text_length(value: Json) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_length, value.values()))
    return sum(map(_text_length, value)) if isinstance(value, list) else 0


def _check_row(check: FileCheck, number: int, row: Object) -> None:
    example = check.num_examples + 1
    kind = _format_of(row)
    if kind is None:
        check.add(number, _UNKNOWN_FORMAT)
        return
    if check.format is None:
        check.format = kind
    if kind != check.format:
        check.add(
            number,
            f"Invalid file format. Example {example} is a {kind} example, but the ones before are {check.format} ones",
        )
        return
    faults: list[str] = []
    {"chat": _check_chat, "preference": _check_preference, "completion": _check_completion}[kind](row, faults)
    if not faults:
        try:
            _read_as_run_does(kind, row)
        except DataError as error:
            faults.append(str(error))
    for fault in faults:
        check.add(number, f"Invalid file format. Example {example}, {fault}")


def _format_of(row: Object) -> str | None:
    if "messages" in row:
        return "chat"
    if "input" in row or any(key in row for key in (*_BETTER, *_WORSE)):
        return "preference"
    return "completion" if "prompt" in row or "completion" in row else None


def _read_as_run_does(kind: str, row: Object) -> None:
    cleaned = clean_row(row)
    check_values(cleaned)
    if kind == "chat":
        read_turns("messages", cleaned["messages"])
    elif kind == "preference":
        read_preference(cleaned)


def _check_chat(row: Object, faults: list[str]) -> None:
    faults += [f"unknown key '{key}'" for key in row if key not in _CHAT_KEYS]
    names = _check_tools(row, faults)
    turns = _check_turns("", row.get("messages"), names, faults)
    if turns is None or faults:
        return
    answers = [turn for turn in turns if turn.get("role") == "assistant"]
    if not answers:
        faults.append("there must be at least one message from the assistant")
    elif turns[-1].get("role") != "assistant":
        faults.append("the last message must be from the assistant")
    elif all(turn.get("weight") == 0 for turn in answers):
        faults.append("every assistant message has weight 0, so there is nothing to learn")


def _check_preference(row: Object, faults: list[str]) -> None:
    known = ("input", *_BETTER, *_WORSE)
    faults += [f"unknown key '{key}'" for key in row if key not in known]
    given = row.get("input")
    if not isinstance(given, dict):
        faults.append("'input' must be a dictionary with 'messages'")
        return
    faults += [f"unknown key 'input.{key}'" for key in given if key not in _INPUT_KEYS]
    names = _check_tools(given, faults)
    turns = _check_turns("input ", given.get("messages"), names, faults)
    if turns and turns[-1].get("role") not in ("user", "tool", "function"):
        faults.append("the input must end with a message from the user or a tool")
    for keys in (_BETTER, _WORSE):
        key = next((key for key in keys if key in row), keys[0])
        answer = row.get(key)
        if not isinstance(answer, list) or len(answer) != 1:
            faults.append(f"'{key}' must be a list of one assistant message")
            continue
        said = _check_turns(f"{key} ", answer, names, faults)
        if said and said[0].get("role") != "assistant":
            faults.append(f"'{key}' must be a list of one assistant message")


def _check_completion(row: Object, faults: list[str]) -> None:
    for key in ("prompt", "completion"):
        if not isinstance(row.get(key), str):
            faults.append(f"'{key}' must be a string")
    if row.get("completion") == "":
        faults.append("'completion' is empty")
    faults += [f"unknown key '{key}'" for key in row if key not in ("prompt", "completion")]


def _check_tools(row: Object, faults: list[str]) -> set[str]:
    """Check the functions of a row, and return their names."""
    names: set[str] = set()
    tools, functions = row.get("tools"), row.get("functions")
    if row.get("parallel_tool_calls") is not None and not isinstance(row["parallel_tool_calls"], bool):
        faults.append("'parallel_tool_calls' must be a boolean")
    for key, value in (("tools", tools), ("functions", functions)):
        if value is not None and (not isinstance(value, list) or not 1 <= len(value) <= 128):
            faults.append(f"'{key}' must be a list of 1 to 128 functions")
    called = (
        [tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None for tool in tools]
        if isinstance(tools, list)
        else []
    )
    for function in [*called, *(functions if isinstance(functions, list) else [])]:
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name:
            names.add(name)
        else:
            faults.append("a tool must be {'type': 'function', 'function': {'name', 'parameters'}}")
    return names


def _check_turns(where: str, value: Json, names: set[str], faults: list[str]) -> list[Object] | None:
    """Check turns, and return them; None where they are no list."""
    if not isinstance(value, list) or not value:
        faults.append(f"{where}'messages' must be a non-empty list")
        return None
    turns: list[Object] = []
    waiting: dict[str, None] = {}
    for position, turn in enumerate(value, 1):
        try:
            if not isinstance(turn, dict):
                raise _FaultError("must be a dictionary")
            _check_turn(turn, names)
            if turn["role"] == "tool":
                waiting.pop(str(turn["tool_call_id"]), None)
            elif waiting:
                raise _FaultError(f"the tool calls {', '.join(waiting)} have no tool message yet")
            calls = turn.get("tool_calls")
            waiting.update(
                {str(call["id"]): None for call in calls if isinstance(call, dict)} if isinstance(calls, list) else {}
            )
            turns.append(turn)
        except _FaultError as error:
            waiting.clear()
            faults.append(f"{where}message {position} {error}")
    return turns


def _check_turn(turn: Object, names: set[str]) -> None:
    """Raise unless a message keeps every rule."""
    role = turn.get("role")
    if "role" not in turn:
        raise _FaultError("Discriminator 'role' is missing in value")
    if role not in _ROLES:
        raise _FaultError(f"has the role {shown(role, 40)}, expected one of {', '.join(_ROLES)}")
    if unknown := [key for key in turn if key not in _MESSAGE_KEYS]:
        raise _FaultError(f"has the unknown key '{unknown[0][:60]}'")
    if "weight" in turn and (role != "assistant" or type(turn["weight"]) is not int or turn["weight"] not in (0, 1)):
        raise _FaultError("has a 'weight' that is not 0 or 1 on an assistant message")
    for key, only in _ONLY.items():
        if turn.get(key) is not None and role != only:
            raise _FaultError(f"has '{key}', which only a message of role {only} may have")
    if role == "tool" and not isinstance(turn.get("tool_call_id"), str):
        raise _FaultError("of role tool needs 'tool_call_id'")
    if role == "function" and not isinstance(turn.get("name"), str):
        raise _FaultError("of role function needs 'name'")
    if not isinstance(turn.get("refusal"), str | None):
        raise _FaultError("has a 'refusal' that is not a string")
    _check_content(turn)
    _check_calls(turn, names)


def _check_content(turn: Object) -> None:
    content, role = turn.get("content"), turn["role"]
    if content is None:
        if role == "function" or (
            role == "assistant" and any(turn.get(key) for key in ("tool_calls", "function_call", "refusal"))
        ):
            return
        raise _FaultError("has no 'content'")
    if isinstance(content, str):
        return
    if not isinstance(content, list) or not content:
        raise _FaultError("has a 'content' that is neither a string nor a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _FaultError(
                "has a part of 'content' that is not {'type': 'text', 'text': …}; no model here sees images"
            )


def _check_calls(turn: Object, names: set[str]) -> None:
    calls = turn.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not calls):
        raise _FaultError("has 'tool_calls' that are not a non-empty list")
    functions: list[Json] = [turn["function_call"]] if turn.get("function_call") is not None else []
    for call in calls if isinstance(calls, list) else []:
        if not isinstance(call, dict) or call.get("type") != "function" or not isinstance(call.get("id"), str):
            raise _FaultError("has a tool call that is not {'id', 'type': 'function', 'function'}")
        functions.append(call.get("function"))
    for function in functions:
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _FaultError("calls a function without a name")
        if names and function["name"] not in names:
            raise _FaultError(f"calls {shown(function['name'], 60)}, which is not among the tools")
        try:
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                raise TypeError
            json.loads(arguments)
        except (ValueError, TypeError, RecursionError):
            raise _FaultError("has 'arguments' of a call that are not a string that holds JSON") from None
