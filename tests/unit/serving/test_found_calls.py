"""Calls of functions in answers, in the forms of the families; text that only looks like one stays text."""

from __future__ import annotations

import json

import pytest

from dist_ft.serving.found_calls import CallReader

NAMES = frozenset({"paint", "mix"})
RED = '{"name": "paint", "arguments": {"color": "red"}}'


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (f"<tool_call>\n{RED}\n</tool_call>", "", ["paint"]),
        (f"Sure. <tool_call>{RED}</tool_call>\n<tool_call>{RED}</tool_call>", "Sure. ", ["paint", "paint"]),
        (f"<tool_call>{RED}", "", ["paint"]),
        (f"[TOOL_CALLS][{RED}, {RED}]", "", ["paint", "paint"]),
        ('[TOOL_CALLS]paint{"color": "red"}[TOOL_CALLS]mix[ARGS]{}', "", ["paint", "mix"]),
        ('{"name": "mix", "parameters": {}}', "", ["mix"]),
        ('<|python_tag|>{"name": "mix", "parameters": {}}', "", ["mix"]),
        ('{"name": "mix", "parameters": "{}"}; {"name": "paint", "arguments": {}}', "", ["mix", "paint"]),
        ('{"name": "other", "parameters": {}}', None, []),
        ('{"color": "red"}', None, []),
        ("a < b and <tool", None, []),
        ("<tool_call>{broken</tool_call>", None, []),
        ("plain", None, []),
        ("", None, []),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_text_and_calls(answer: str, text: str | None, calls: list[str], size: int) -> None:
    reader = CallReader(NAMES)
    passed = "".join(reader.push(answer[at : at + size]) for at in range(0, len(answer), size))
    rest, found = reader.finish()
    assert [call.name for call in found] == calls
    assert passed + rest == (answer if text is None else text)
    assert all(isinstance(json.loads(call.arguments), dict) for call in found)


def test_without_functions_everything_is_text() -> None:
    reader = CallReader(frozenset())
    assert reader.push(RED) == RED
    assert reader.finish() == ("", [])
