"""What a template leaves out is named; what it only trims or quotes is not."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.errors import DataError
from dist_ft.model.chat.omissions import check_answer, check_context

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<s>be kind</s>", " be kind \n"),
        ('{"result": "a \\"b\\"\\n\\u0000 ü"}', 'a "b"\n\x00 ü'),
        ("line one\n    line two", "line one\nline two"),
        ("anything", " \n"),
    ],
)
def test_what_is_trimmed_quoted_or_indented_is_there(text: str, content: str) -> None:
    check_context(text, [_turn("system", content)], [])
    check_answer(text, 0, _turn("assistant", content))


def test_a_turn_that_is_left_out_is_named() -> None:
    turns = [_turn("user", "hi"), _turn("tool", "sunny, 20 °C")]
    with pytest.raises(DataError, match=r"turn 1 \(tool\): 'sunny, 20 °C'.*data\.chat_template"):
        check_context("hi", turns, [])


def test_turns_may_stand_in_another_order() -> None:
    check_context("<u>two</u><s>one</s><u>three</u>", [_turn("system", "one"), _turn("user", "two")], [])


def test_earlier_answers_may_be_rewritten() -> None:
    check_context("hi", [_turn("user", "hi"), _turn("assistant", "<think>hm</think>yes")], [])


def test_tools_that_are_left_out_are_named() -> None:
    check_context('{"name": "weather"}', [], [TOOL])
    with pytest.raises(DataError, match="leaves out the tools: 'weather'"):
        check_context("hi", [], [TOOL])


@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\nyes", "<think>hm</think>yes", "[hm] yes"])
def test_reasoning_may_be_laid_out_otherwise(text: str) -> None:
    check_answer(text, 1, _turn("assistant", "<think> hm</think>\nyes"))


@pytest.mark.parametrize(("text", "lost"), [("yes", "hm"), ("<think>hm</think>", "yes"), ("", "hm")])
def test_a_part_of_an_answer_that_is_left_out_is_named(text: str, lost: str) -> None:
    with pytest.raises(DataError, match=f"the answer in turn 1: '{lost}'"):
        check_answer(text, 1, _turn("assistant", "<think>hm</think>yes"))


def test_a_call_that_is_left_out_is_named() -> None:
    answer = _turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {}}}])
    check_answer('{"name": "weather"}', 1, answer)
    with pytest.raises(DataError, match="the call of 'weather' in turn 1"):
        check_answer("<|im_end|>", 1, answer)
