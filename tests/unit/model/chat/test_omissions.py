"""What a template leaves out is named, however often it is said; what it only trims, quotes or moves is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from dist_ft.errors import DataError
from dist_ft.model.chat.omissions import check_answer, check_context
from dist_ft.model.chat.render import Renderer
from dist_ft.model.embedded import byte_tokenizer
from dist_ft.records import Conversation, Message

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _calls(*arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": given}} for given in arguments]
    return _turn("assistant", "", tool_calls=calls, **more)


def _check_context(text: str, turns: Sequence[Message], tools: Sequence[dict[str, Any]] = (), until: str = "") -> None:
    check_context(text, turns, tools, lambda number: until)


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
    _check_context(text, [_turn("system", content)])
    check_answer(text, 0, _turn("assistant", content))


@pytest.mark.parametrize(
    "content",
    ["a\nb", "C:\\new\\table", "\\nabla \\frac{1}{2}", "é \U0001f600 \u2028", 'say "\\"', "a\b\tb", "\\u00e9", "</s>"],
)
def test_text_may_be_quoted_in_any_way(content: str) -> None:
    quoted = [json.dumps(content), json.dumps(content, ensure_ascii=False), json.dumps(json.dumps(content)), content]
    for text in (*quoted, json.dumps(content).replace("<", "\\u003c").replace("/", "\\/")):
        _check_context(f"({text})", [_turn("tool", content)])
        with pytest.raises(DataError, match="less often than in the row"):
            _check_context(f"({text})", [_turn("tool", content)] * 2)


def test_a_turn_that_is_left_out_is_named() -> None:
    turns = [_turn("user", "hi"), _turn("tool", "sunny, 20 °C")]
    with pytest.raises(DataError, match=r"turn 1 \(tool\): 'sunny, 20 °C'.*data\.chat_template"):
        _check_context("hi", turns)


def test_what_is_said_twice_is_there_twice() -> None:
    turns = [_turn("user", "yes"), _turn("assistant", "Sure?"), _turn("user", "yes")]
    _check_context("yes Sure? yes", turns)
    _check_context("<sys>yes</sys> Sure? yes", turns)
    with pytest.raises(DataError, match=r"turn 0 \(user\): 'yes' is in its text less often"):
        _check_context("yes Sure? no", turns, until="yes Sure?")
    with pytest.raises(DataError, match="less often"):
        _check_context("Rome? wet", [_turn("user", "Rome?"), _turn("tool", "wet"), _turn("user", "Rome?")])


def test_turns_may_stand_in_another_order() -> None:
    _check_context("<u>two</u><s>one</s><u>three</u>", [_turn("system", "one"), _turn("user", "two")])


def test_earlier_answers_may_be_rewritten_if_they_were_whole_before() -> None:
    turns = [_turn("user", "hi"), _turn("assistant", "<think>hm</think>yes")]
    _check_context("hi yes", turns)
    _check_context("hi", turns, until="hi <think>hm</think>yes")
    with pytest.raises(DataError, match="a part of the answer in turn 1: 'yes'"):
        _check_context("hi", turns, until="hi")


def test_tools_that_are_left_out_are_named() -> None:
    _check_context('{"name": "weather"}', [], [TOOL])
    with pytest.raises(DataError, match="leaves out the tools: 'weather'"):
        _check_context("hi", [], [TOOL])
    _check_context(json.dumps({"name": "天气"}), [], [{"name": "天气"}])
    with pytest.raises(DataError, match="leaves out the tools: 'weather'"):  # the call alone names it
        _check_context('{"name": "weather", "city": "Oslo"}', [_calls({"city": "Oslo"})], [TOOL])


@pytest.mark.parametrize("text", ["<think>\nhm\n</think>\n\nyes", "<think>hm</think>yes", "[hm] yes"])
def test_reasoning_may_be_laid_out_otherwise(text: str) -> None:
    check_answer(text, 1, _turn("assistant", "<think> hm</think>\nyes"))
    check_answer(text, 1, _turn("assistant", "yes", reasoning_content="hm\n"))


@pytest.mark.parametrize(("text", "lost"), [("yes", "hm"), ("<think>hm</think>", "yes"), ("", "hm")])
def test_a_part_of_an_answer_that_is_left_out_is_named(text: str, lost: str) -> None:
    with pytest.raises(DataError, match=f"the answer in turn 1: '{lost}'"):
        check_answer(text, 1, _turn("assistant", "<think>hm</think>yes"))
    with pytest.raises(DataError, match=f"the answer in turn 1: '{lost}'"):
        check_answer(text, 1, _turn("assistant", "yes", reasoning_content="hm"))


def test_a_call_that_is_left_out_is_named() -> None:
    check_answer('{"name": "weather"}', 1, _calls({}))
    with pytest.raises(DataError, match="the call of 'weather' in turn 1"):
        check_answer("<|im_end|>", 1, _calls({}))
    with pytest.raises(DataError, match="the call of 'weather' in turn 1: 'weather' is in its text less often"):
        check_answer('{"name": "weather"}', 1, _calls({}, {}))


ARGUMENTS = {"city": 'Rome "old"\n', "days": [1, 2.5], "at": {"lat": -3, "exact": True}, "none": None, "empty": ""}


@pytest.mark.parametrize(
    "text",
    [
        f"weather {json.dumps(ARGUMENTS)}",
        f"weather {json.dumps(ARGUMENTS, sort_keys=True)}",
        f"weather {json.dumps(json.dumps(ARGUMENTS))}",
        f"weather {ARGUMENTS}",
        'weather(exact=true, city="Rome \\"old\\"\\n", days=[1, 2.5], lat=-3)',
        '<function=weather><city>Rome "old"\n</city><days>[1, 2.5]</days><at>{"lat": -3, "exact": true}</at>',
    ],
)
def test_arguments_may_be_written_in_any_way(text: str) -> None:
    check_answer(text, 0, _calls(ARGUMENTS))


@pytest.mark.parametrize("lost", ['Rome \\"old\\"', "2.5", "-3", "true"])
def test_a_value_of_an_argument_that_is_left_out_is_named(lost: str) -> None:
    text = f"weather {json.dumps(ARGUMENTS)}"
    assert lost in text
    with pytest.raises(DataError, match="an argument of the call of 'weather' in turn 0"):
        check_answer(text.replace(lost, ""), 0, _calls(ARGUMENTS))


HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FIRST_CALL = (
    HEAD
    + "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}</call>{% else %}{{ m.content }}{% endif %}"
    + TAIL
)
ALL_CALLS = HEAD + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}" + TAIL
NO_CALLS = HEAD + "{{ m.content }}" + TAIL
THOUGHTS = (
    HEAD
    + "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    + TAIL
)


def _samples(template: str, turns: list[Message], train_on: str = "assistant") -> int:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return len(Renderer(tokenizer, train_on)(Conversation(turns)))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("weight", [{}, {"weight": 0}])
def test_a_second_call_of_the_same_function_is_not_lost(train_on: str, weight: dict[str, int]) -> None:
    """Also where the answer is only context: the question, the result and the last answer name the city, too."""
    turns = [
        _turn("user", "Weather in Oslo and Rome?"), _calls({"city": "Oslo"}, {"city": "Rome"}, **weight),
        _turn("tool", "Rome: wet"), _turn("assistant", "Rome is wet."),
    ]  # fmt: skip
    assert _samples(ALL_CALLS, turns, train_on) == 1
    for template in (FIRST_CALL, NO_CALLS):
        with pytest.raises(DataError, match=r"the call of 'weather' in turn 1"):
            _samples(template, turns, train_on)


def test_text_beside_a_call_is_not_lost() -> None:
    turns = [_turn("user", "?"), _calls({"city": "Oslo"}) | {"content": "Let me look."}]
    assert _samples(ALL_CALLS, turns) == 1
    with pytest.raises(DataError, match="a part of the answer in turn 1: 'Let me look"):
        _samples(FIRST_CALL, turns)


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_reasoning_needs_a_place_in_the_template(train_on: str) -> None:
    thought = [_turn("user", "?"), _turn("assistant", "Yes.", reasoning_content="hm")]
    longer = [*thought, _turn("user", "!"), _turn("assistant", "No.", reasoning_content="so")]
    assert _samples(THOUGHTS, thought, train_on) == 1
    assert _samples(THOUGHTS, longer, train_on) == (2 if train_on == "assistant" else 1)
    for turns in (thought, longer):
        with pytest.raises(DataError, match="the reasoning of the answer in turn 1: 'hm' is not in its text"):
            _samples(NO_CALLS, turns, train_on)
    assert _samples(NO_CALLS, [*thought[:1], {**thought[1], "weight": 0}, *longer[2:3], _turn("assistant", "No.")]) == 1
