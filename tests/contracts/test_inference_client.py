"""The `openai` client, unchanged, gets what it expects of the inference API."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import urllib.parse
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from dist_ft.service.api_keys import add_key, list_keys, remove_key
from dist_ft.serving.backend import ServedName
from tests.helpers.served import engine_spec, make_adapter, make_base
from tests.helpers.serving import InferenceServer, inference_server

TURNS: Any = [{"role": "user", "content": "red and green"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"],
            "additionalProperties": False,
        },
    },
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServer]:
    place = tmp_path_factory.mktemp("serving")
    base = make_base(place / "base")
    adapter = make_adapter(base, place / "adapter", 1)
    spec = engine_spec(base, place, max_waiting=8, num_threads=1)
    models = {
        "base": ServedName("base", 1, "dist-ft", spec),
        "ft:base:org::a/b": ServedName("ft:base:org::a/b", 2, "org-default", spec, str(adapter)),
        "broken": ServedName("broken", 3, "dist-ft", spec, str(place / "nothing")),
    }
    with inference_server(models, place) as found:
        yield found


@pytest.fixture
def client(server: InferenceServer) -> OpenAI:
    return OpenAI(api_key="any", base_url=server.url, max_retries=0, timeout=120)


def test_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "ft:base:org::a/b", "broken"]
    assert client.models.retrieve("ft:base:org::a/b").owned_by == "org-default"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat_whole_and_streamed_say_the_same(client: OpenAI) -> None:
    asked: Any = {"messages": TURNS, "max_tokens": 20, "temperature": 0, "model": "base"}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert (whole.object, choice.message.role, choice.logprobs, choice.message.refusal) == (
        "chat.completion", "assistant", None, None,
    )  # fmt: skip
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage and whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_adapter_and_base_answer_differently(client: OpenAI) -> None:
    texts = [
        client.chat.completions.create(model=name, messages=TURNS, max_tokens=20, temperature=0)
        .choices[0]
        .message.content
        for name in ("base", "ft:base:org::a/b", "base")
    ]
    assert texts[0] == texts[2] != texts[1]


def test_several_answers_with_a_seed(client: OpenAI) -> None:
    def ask(seed: int) -> list[str | None]:
        found = client.chat.completions.create(model="base", messages=TURNS, max_tokens=10, n=3, seed=seed)
        return [choice.message.content for choice in found.choices]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 3


def test_logprobs_of_chat(client: OpenAI) -> None:
    asked: Any = {"model": "base", "messages": TURNS, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    found = client.chat.completions.create(**asked, temperature=0).choices[0].logprobs
    assert found and found.content
    assert all(one.logprob == one.top_logprobs[0].logprob for one in found.content)
    assert all(len(one.top_logprobs) == 2 and one.bytes for one in found.content)
    streamed = client.chat.completions.create(**asked, temperature=0, stream=True)
    told = [one for c in streamed if c.choices and (held := c.choices[0].logprobs) for one in held.content or []]
    assert told == found.content


def test_a_schema_is_kept(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        found = client.chat.completions.create(
            model="base", messages=TURNS, response_format=form, seed=seed, max_tokens=300
        )
        if found.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(found.choices[0].message.content or "")["ok"], bool)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_that_is_forced(client: OpenAI, choice: Any) -> None:
    asked: Any = {"model": "base", "messages": TURNS, "tools": [TOOL], "tool_choice": choice, "max_tokens": 400}
    found = client.chat.completions.create(**asked, temperature=0).choices[0]
    assert found.finish_reason == ("tool_calls" if choice == "required" else "stop"), found
    (call,) = found.message.tool_calls or []
    assert call.type == "function" and call.function.name == "paint"
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    pieces = [p for c in chunks for p in c.choices[0].delta.tool_calls or []]
    assert pieces[0].function and pieces[0].function.name == "paint" and pieces[0].id
    assert "".join((p.function and p.function.arguments) or "" for p in pieces) == call.function.arguments
    turns = [*TURNS, found.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert client.chat.completions.create(model="base", messages=turns, tools=[TOOL], max_tokens=3).choices


def test_completions_of_text_and_tokens(client: OpenAI) -> None:
    asked: Any = {"model": "base", "temperature": 0, "max_tokens": 8}
    text = client.completions.create(**asked, prompt="red", logprobs=2)
    (choice,) = text.choices
    assert text.object == "text_completion" and choice.logprobs
    assert choice.logprobs.text_offset and choice.logprobs.text_offset[0] == 0
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs or [])
    several = client.completions.create(**asked, prompt=["red", "blue"], echo=True)
    assert [c.index for c in several.choices] == [0, 1]
    assert several.choices[0].text == "red" + choice.text
    tokens = client.completions.create(**asked, prompt=[[66, 67], [68]])
    assert len(tokens.choices) == 2
    streamed = client.completions.create(**asked, prompt="red", stream=True)
    assert "".join(c.choices[0].text for c in streamed) == choice.text
    assert client.completions.create(model="base", prompt="red").usage.completion_tokens <= 16  # type: ignore[union-attr]


def test_responses_whole_and_streamed(client: OpenAI) -> None:
    asked: Any = {
        "model": "base",
        "input": "red",
        "instructions": "Be brief.",
        "temperature": 0,
        "max_output_tokens": 20,
    }
    whole = client.responses.create(**asked)
    assert whole.status in ("completed", "incomplete") and whole.usage
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        f"response.{whole.status}",
    ]  # fmt: skip
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text
    turns: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "red"}]}, *whole.output,
        {"role": "user", "content": "again"},
    ]  # fmt: skip
    assert client.responses.create(model="base", input=turns, max_output_tokens=16).output


def test_responses_with_functions_and_schema(client: OpenAI) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    asked: Any = {"model": "base", "input": "red", "tools": [tool], "tool_choice": "required", "temperature": 0}
    (call,) = client.responses.create(**asked).output
    assert call.type == "function_call" and call.name == "paint"
    events = list(client.responses.create(**asked, stream=True))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done[0].arguments == call.arguments
    back: Any = [
        {"role": "user", "content": "red"}, call,
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"},
    ]  # fmt: skip
    assert client.responses.create(model="base", input=back, tools=[tool], max_output_tokens=16).output
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA}}
    found = client.responses.create(model="base", input="red", text=form, max_output_tokens=400, temperature=0)
    if found.status == "completed":
        assert isinstance(json.loads(found.output_text)["ok"], bool)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"n": 0}, "n"), ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
        ({"tool_choice": "required"}, "tool_choice"), ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"presence_penalty": 9}, "presence_penalty"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"metadata": 5}, "metadata"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "magic"}}}},
            "response_format",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": SCHEMA}}},
            "response_format.json_schema.name",
        ),
        ({"extra_body": {"nonsense": 1}}, "nonsense"), ({"max_tokens": 4000}, "messages"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: OpenAI, changes: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "base", "messages": TURNS, **changes})
    assert caught.value.param == param, caught.value


def test_errors_of_names_and_models(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=TURNS)
    with pytest.raises(openai.BadRequestError, match="adapter_config"):
        client.chat.completions.create(model="broken", messages=TURNS)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="base", input="red", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_many_at_once_get_their_own_answers(server: InferenceServer) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        client = AsyncOpenAI(api_key="any", base_url=server.url, max_retries=3)

        async def one(number: int) -> str:
            model = ("base", "ft:base:org::a/b")[number % 2]
            stream = await client.completions.create(
                model=model, prompt=f"red {number}", temperature=0, max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*map(one, range(8)))
        alone = [await one(number) for number in range(8)]
        await client.close()
        return together, alone

    together, alone = asyncio.run(ask())
    assert together == alone and len(set(alone)) > 4


def test_a_client_that_leaves_frees_its_place(client: OpenAI, server: InferenceServer) -> None:
    for _ in range(6):
        stream = client.chat.completions.create(model="base", messages=TURNS, max_tokens=1000, stream=True)
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(model="base", messages=TURNS, max_tokens=5).choices


def test_a_client_that_never_reads_slows_nobody(client: OpenAI, server: InferenceServer) -> None:
    place = urllib.parse.urlsplit(server.url)
    asked: Any = {"model": "base", "prompt": "red", "max_tokens": 1500, "stream": True, "n": 8, "logprobs": 5}
    body = json.dumps(asked).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    assert place.hostname and place.port
    with socket.create_connection((place.hostname, place.port)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(head.encode() + b"\r\n" + body)
        deaf.recv(100)
        for _ in range(3):
            assert client.completions.create(model="base", prompt="blue", max_tokens=10).choices


def test_a_server_with_keys_asks_for_one(server: InferenceServer) -> None:
    key = add_key(server.index, "member", "default", "test", None)
    try:
        with pytest.raises(openai.AuthenticationError):
            OpenAI(api_key="wrong", base_url=server.url, max_retries=0).models.list()
        assert OpenAI(api_key=key, base_url=server.url, max_retries=0).models.list().data
    finally:
        remove_key(server.index, list_keys(server.index)[0].id)


def test_an_engine_that_dies_in_mid_stream(client: OpenAI, server: InferenceServer) -> None:
    bias: Any = {"257": -100, "256": -100, "258": -100}  # no end of turn
    stream = client.completions.create(model="base", prompt="red", max_tokens=1500, stream=True, logit_bias=bias)
    next(iter(stream))
    assert server.backend.engines
    (pid,) = server.backend.engines.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine was lost"):
        list(stream)
    assert client.chat.completions.create(model="base", messages=TURNS, max_tokens=5).choices
