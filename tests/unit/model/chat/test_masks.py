"""For every template: trained is what the assistant wrote and the mark that ends its turn, at its place, once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ft.model.chat.render import Renderer
from dist_ft.model.chat.sandbox import TODAY
from dist_ft.records import Completion, Conversation, Message, Sample
from tests.helpers.chat_templates import NAMED, STOCK, Family

FAMILIES = STOCK | NAMED
RENDERERS = {name: family.renderer() for name, family in FAMILIES.items()}

DATE = "%d %b %Y"
"""How Llama 3.1 writes today's."""
AWKWARD = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>\n", "</s>", "[INST] ", "[/INST]", "<|end|>",
    "<|endoftext|>", "<tool_call>", "User: ", "Assistant:", "<", "|im_end|>", "{{ x }}", "{% raw %}", '"', "\\", "\\n",
    "e\u0301", "👩\u200d👩\u200d👧", "\u202b\u05e9\u05dc\u202c", "\u200b", "\u2063", "\x00", "\ufeff", "漢字",
    " ", "\n", "\n\n", "\u00a0",
]  # fmt: skip
TEXT = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=5).map("".join)
VALUES = st.none() | st.booleans() | st.integers() | TEXT | st.lists(st.integers(), max_size=2)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "größe", "n"]), VALUES, max_size=2)
FUNCTIONS = ("weather", "find_flights")
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in FUNCTIONS
)


def turn(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


@st.composite
def chats(draw: st.DrawFn, family: Family) -> Conversation:
    """Turns of text only; questions and answers in any order where the family takes that."""
    messages = [turn("system", draw(TEXT))] if family.has_system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(turn("user", draw(TEXT)))
        for _ in range(1 if family.alternates else draw(st.integers(0, 2))):
            messages.append(turn("assistant", draw(TEXT)))
    return Conversation([*messages, turn("user", "last"), turn("assistant", draw(TEXT))][: len(messages) + 2])


@st.composite
def chats_with_tools(draw: st.DrawFn, family: Family) -> Conversation:
    """Questions that are answered by way of one or two calls."""
    messages = [turn("system", draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append(turn("user", draw(TEXT)))
        for number in range(draw(st.integers(0, 2))):
            identity = f"call{number:05}"
            function = {"name": draw(st.sampled_from(FUNCTIONS)), "arguments": draw(ARGUMENTS)}
            call = {"id": identity, "type": "function", "function": function}
            messages.append(turn("assistant", "", tool_calls=[call]))
            messages.append(turn("tool", draw(TEXT), tool_call_id=identity, name=function["name"]))
        messages.append(turn("assistant", draw(TEXT)))
    return Conversation(messages, TOOLS)


def runs(renderer: Renderer, sample: Sample) -> list[tuple[str, str]]:
    """Each unbroken run of trained tokens, behind the text before it."""
    decode = renderer._tokenizer.decode
    ids, trained = sample.input_ids, [*sample.trained, False]
    starts = [i for i in range(len(ids)) if trained[i] and not (i and trained[i - 1])]
    return [(decode(ids[:start]), decode(ids[start : trained.index(False, start)])) for start in starts]


def by_transformers(renderer: Renderer, messages: list[Message], tools: Any, prompt: bool) -> str:
    text = renderer._tokenizer.apply_chat_template(
        messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
    )
    return str(text)


def check(name: str, conversation: Conversation) -> None:
    """Every answer is trained once, whole, behind the prompt that transformers makes for it, and nothing else is."""
    family, renderer = FAMILIES[name], RENDERERS[name]
    messages = conversation.messages
    samples = renderer(conversation)
    found = []
    for sample in samples:
        parts = runs(renderer, sample)
        found += [(before, text, index == len(parts) - 1) for index, (before, text) in enumerate(parts)]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(answers)
    for answer, (before, text, is_last) in zip(answers, found, strict=True):
        assert text == family.answer(messages[answer], is_last)
        prompt = by_transformers(renderer, messages[:answer], conversation.tools, prompt=True)
        assert before == prompt.replace(datetime.now().strftime(DATE), TODAY.strftime(DATE))
    if not family.rewrites and not conversation.tools:
        assert len(samples) == 1


QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("name", sorted(FAMILIES))
@QUICK
@given(data=st.data())
def test_trained_is_what_the_assistant_wrote(name: str, data: st.DataObject) -> None:
    check(name, data.draw(chats(FAMILIES[name])))


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.has_tools))
@QUICK
@given(data=st.data())
def test_trained_is_what_the_assistant_wrote_calls_included(name: str, data: st.DataObject) -> None:
    check(name, data.draw(chats_with_tools(FAMILIES[name])))


@pytest.mark.parametrize("name", sorted(name for name, family in FAMILIES.items() if family.has_tools))
@settings(QUICK, max_examples=10)
@given(data=st.data())
def test_the_text_is_that_of_transformers(name: str, data: st.DataObject) -> None:
    conversation = data.draw(chats_with_tools(FAMILIES[name]))
    theirs = by_transformers(RENDERERS[name], conversation.messages, conversation.tools, prompt=False)
    ours = RENDERERS[name].text(conversation.messages, conversation.tools)
    assert ours == theirs.replace(datetime.now().strftime(DATE), TODAY.strftime(DATE))


@QUICK
@given(prompt=TEXT, completion=TEXT)
def test_of_raw_text_the_completion_is_trained_and_the_end(prompt: str, completion: str) -> None:
    renderer = RENDERERS["phi3"]
    (sample,) = renderer(Completion("?" + prompt, completion))
    end = "" if ("?" + prompt + completion).endswith("<|endoftext|>") else "<|endoftext|>"
    expected = [("?" + prompt, completion + end)] if completion + end else []
    assert runs(renderer, sample) == expected
