"""The token that stops is trained though the next turn's head writes it, and a prompt that is always written is not."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.model.chat.render import Renderer
from dist_ft.model.chat.stops import Endings
from dist_ft.model.embedded import CHATML, byte_tokenizer
from dist_ft.records import Conversation, Message
from tests.helpers.chat_templates import GLM45, NAMED, STOCK, Family

ALWAYS_ASKS = CHATML.partition("{% if add_generation_prompt %}")[0] + "{{ '<|im_start|>assistant\\n' }}"
ENDS = {
    "glm4.5": Endings(before_turn="<|user|>", before_result="<|observation|>"),
    "apertus": Endings(before_turn="<|assistant_end|>"),
    "apriel": Endings(before_turn="\n<|end|>"),
    "command": Endings(prompt="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
}
TWO: list[Message] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
]


def endings(renderer: Renderer) -> Endings:
    return renderer._template(False)[2]


def trained(renderer: Renderer, messages: list[Message], tools: Any = ()) -> list[str]:
    """Returns the trained text of each sample."""
    return [
        renderer._tokenizer.decode([i for i, is_trained in zip(s.input_ids, s.trained, strict=True) if is_trained])
        for s in renderer(Conversation(messages, tools))
    ]


def always_asking(train_on: str = "assistant", thought: str = "") -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ALWAYS_ASKS + f"{{{{ {thought!r} }}}}"
    return Renderer(tokenizer, train_on)


@pytest.mark.parametrize("name", sorted(STOCK | NAMED))
def test_endings_are_found_for_those_templates_alone_that_need_them(name: str) -> None:
    renderer = (STOCK | NAMED)[name].renderer()
    assert endings(renderer) == ENDS.get(name, Endings())
    assert bool(renderer.endings_key) == (name in ENDS), "keys of token shards change where tokens do, and only there"


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [
        ("assistant", "one<|im_end|>two<|im_end|>"),
        ("last", "two<|im_end|>"),
        ("all", "user\na<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
                "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_always_written_is_no_part_of_an_answer(train_on: str, expected: str) -> None:
    assert trained(always_asking(train_on), TWO) == [expected]


@pytest.mark.parametrize("thought", ["<think>", "<think>\n", "<think>\n\n</think>\n\n"])
def test_a_prompt_that_opens_a_thought_is_no_part_of_an_answer_without_one(thought: str) -> None:
    assert trained(always_asking(thought=thought), TWO) == ["one<|im_end|>two<|im_end|>"]


def test_a_prompt_is_still_asked_for_where_the_model_is_to_answer() -> None:
    assert always_asking().prompt(Conversation(TWO)).endswith("b<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("is_listed", [True, False])
def test_the_head_of_the_next_turn_is_trained_if_generation_stops_there(is_listed: bool) -> None:
    renderer = STOCK["glm4.5"].renderer() if is_listed else Renderer(STOCK["glm4.5"].tokenizer())
    (sample,) = renderer(Conversation(TWO))
    (text,) = trained(renderer, TWO)
    stop = "<|user|>" if is_listed else ""
    assert text == f"\n<think></think>\none{stop}\n<think></think>\ntwo{stop}"
    assert sample.num_unended == (0 if is_listed else 2)


def test_the_stop_is_that_of_the_turn_that_comes_next() -> None:
    call: Any = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns: list[Message] = [
        TWO[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "two"},
    ]
    tools = ({"type": "function", "function": {"name": "f"}},)
    renderer = STOCK["glm4.5"].renderer()
    said = '\n<think></think>\n<tool_call>{"name": "f", "arguments": {}}</tool_call><|observation|>'
    assert trained(renderer, turns, tools) == [said + "\n<think></think>\ntwo<|user|>"]
    assert trained(renderer, turns[:2], tools) == [said], "a call that ends the row waits for its result"


def test_the_stop_of_an_answer_is_trained_where_the_next_answer_has_weight_0() -> None:
    turns: list[Message] = [*TWO[:3], {**TWO[3], "weight": 0}]
    assert trained(STOCK["apriel"].renderer(), turns) == ["one\n<|end|>"]
    turns = [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]
    assert trained(STOCK["apriel"].renderer(), turns) == ["two\n<|end|>"]


def test_an_end_of_text_that_is_written_twice_is_no_prompt() -> None:
    same = Family(STOCK["phi3"].template, STOCK["phi3"].answer, "<|end|>", marks=("<|user|>", "<|assistant|>"))
    assert trained(same.renderer(), TWO) == ["one<|end|>two<|end|>\n<|end|>"]


def test_an_answer_that_is_ended_by_text_alone_is_counted() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GLM45.replace("<|", "[").replace("|>", "]")
    (sample,) = Renderer(tokenizer)(Conversation(TWO))
    assert sample.num_unended == 2
