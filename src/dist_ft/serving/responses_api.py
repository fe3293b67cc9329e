"""Responses: requests, answers, streams. Nothing is stored, so no earlier response can be gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

from dist_ft.engine.protocol import Ask, Prompt
from dist_ft.service.wire import ApiError, Json, Object, as_object, as_text, bad_request, new_id
from dist_ft.serving.asked import (
    Asked,
    check_members,
    chosen_of,
    flag_of,
    int_of,
    model_of,
    sampling_of,
    schema_of,
    tools_in,
    turns_of,
)
from dist_ft.serving.found_calls import Call, CallReader
from dist_ft.serving.gathered import Answer, Begun, gathered, line_of, logprobs_of

_KNOWN = (
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "tools",
    "tool_choice", "parallel_tool_calls", "text", "stream", "stream_options", "truncation", "include",
)  # fmt: skip
_REFUSED = {
    "previous_response_id": "is not supported, as responses are not stored; send the earlier items in 'input'",
    "conversation": "is not supported, as responses are not stored; send the earlier items in 'input'",
    "background": "is not supported", "prompt": "is not supported", "max_tool_calls": "is not supported",
    "reasoning": "is not supported by this model",
}  # fmt: skip
_LEAST_TOKENS = 16
_WITH_LOGPROBS = "message.output_text.logprobs"
_LONGEST = 1 << 20


def read_response(body: Object) -> Asked:
    """Return what a body asks for.

    Raises:
        ApiError: It cannot be answered.
    """
    check_members(body, _KNOWN, _REFUSED)
    if body.get("truncation") not in (None, "disabled"):
        raise bad_request("'truncation' other than 'disabled' is not supported.", "truncation")
    tools = tools_in({**body, "tools": _tools(body.get("tools"))})
    forced, is_named = chosen_of(body, tools)
    include = [] if body.get("include") is None else body["include"]
    if not isinstance(include, list):
        raise bad_request("Invalid type for 'include': expected a list.", "include")
    top = int_of(body, "top_logprobs", 0, 20)
    has_logprobs = top is not None or _WITH_LOGPROBS in include
    plain: Object = {key: body[key] for key in ("temperature", "top_p") if key in body}
    sampling = sampling_of(
        plain, int_of(body, "max_output_tokens", _LEAST_TOKENS), (top or 0) if has_logprobs else None
    )
    turns: list[Json] = [] if body.get("input") is None else _items(body["input"])
    if body.get("instructions") is not None:
        turns = [{"role": "system", "content": as_text(body["instructions"], "instructions", _LONGEST)}, *turns]
    form = as_object(body["text"], "text").get("format") if body.get("text") is not None else None
    return Asked(
        model=model_of(body),
        ask=Ask(
            new_id("resp_"), Prompt(turns_of(turns, "input"), tools=tools), sampling,
            grammar=forced or schema_of(form, "text.format"), keeps_marks=bool(tools),
        ),
        is_streamed=flag_of(body, "stream"),
        functions=frozenset(tool["function"]["name"] for tool in tools),
        is_named=is_named,
    )  # fmt: skip


def _tools(value: Json) -> Json:
    """Return functions in the form of chat, where they stand in an object of their own."""
    if not isinstance(value, list):
        return value
    found: list[Json] = []
    for tool in value:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise bad_request("Invalid 'tools': only functions are supported.", "tools")
        function: Object = {k: v for k, v in tool.items() if k not in ("type", "strict") and v is not None}
        found.append({"type": "function", "function": function})
    return found


def _items(value: Json) -> list[Json]:
    """Return the turns of an input."""
    if isinstance(value, str):
        return [{"role": "user", "content": as_text(value, "input", _LONGEST)}]
    if not isinstance(value, list):
        raise bad_request("Invalid 'input': expected text or a list of items.", "input")
    return [_turn(item, number) for number, item in enumerate(value)]


def _turn(item: Json, number: int) -> Json:
    found = as_object(item, f"input[{number}]")
    kind = found.get("type", "message")
    if kind == "function_call":
        function: Object = {"name": found.get("name"), "arguments": found.get("arguments")}
        call: Object = {"id": found.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        output = found.get("output")
        text = output if isinstance(output, str) else json.dumps(output)
        return {"role": "tool", "tool_call_id": found.get("call_id"), "content": text}
    if kind != "message":
        raise bad_request(f"Invalid 'input[{number}]': items of type {kind!r} are not supported.", "input")
    content = found.get("content")
    if isinstance(content, list):
        content = [{"type": p.get("type"), "text": p.get("text")} if isinstance(p, dict) else p for p in content]
    return {"role": found.get("role"), "content": content}


async def response_answer(asked: Asked, begun: Begun, body: Object) -> Object:
    """Return a whole response."""
    (answer,) = await gathered(begun, 1)
    reader = CallReader(asked.functions)
    text = reader.push(answer.text)
    rest, calls = reader.finish()
    items = _message_items(text + rest, answer, has_calls=bool(calls)) + [_call_item(call) for call in calls]
    return _response(asked, body, items, answer, begun.num_prompt_tokens)


def _message_items(text: str, answer: Answer, has_calls: bool) -> list[Json]:
    if has_calls and not text.strip():
        return []
    return [_message(new_id("msg_"), text, answer)]


def _part(text: str, answer: Answer) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs_of(answer.chosen)}


def _message(item_id: str, text: str, answer: Answer) -> Object:
    status = "incomplete" if answer.finish == "length" else "completed"
    return {
        "id": item_id, "type": "message", "role": "assistant", "status": status, "content": [_part(text, answer)],
    }  # fmt: skip


def _call_item(call: Call) -> Object:
    return {
        "id": new_id("fc_"), "type": "function_call", "status": "completed", "call_id": new_id("", 9),
        "name": call.name, "arguments": call.arguments,
    }  # fmt: skip


def _response(asked: Asked, body: Object, output: list[Json], answer: Answer | None, num_prompt_tokens: int) -> Object:
    """Return the API's object; without an answer it is in progress."""
    is_cut = answer is not None and answer.finish == "length"
    status = "in_progress" if answer is None else "incomplete" if is_cut else "completed"
    sampling = asked.ask.sampling
    usage: Object | None = None
    if answer is not None:
        usage = {
            "input_tokens": num_prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": answer.num_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt_tokens + answer.num_tokens,
        }  # fmt: skip
    return {
        "id": asked.ask.id, "object": "response", "created_at": int(time.time()), "status": status, "background": False,
        "error": None, "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.get("instructions"), "max_output_tokens": sampling.max_tokens, "model": asked.model,
        "output": output, "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
        "temperature": sampling.temperature, "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto", "tools": body.get("tools") or [],
        "top_p": sampling.top_p, "truncation": "disabled", "usage": usage, "user": None,
        "metadata": body.get("metadata") or {},
    }  # fmt: skip


class _Numbered:
    """Writes events with their numbers."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, kind: str, **members: Any) -> bytes:
        value: Object = {"type": kind, "sequence_number": self._count, **members}
        self._count += 1
        return line_of(value, kind)


async def response_stream(asked: Asked, begun: Begun, body: Object) -> AsyncIterator[bytes]:
    """Yield a response in pieces."""
    event = _Numbered()
    answer, reader, text, output = Answer(), CallReader(asked.functions), "", list[Json]()
    at: dict[str, Any] = {"item_id": new_id("msg_"), "output_index": 0, "content_index": 0}
    try:
        started = _response(asked, body, [], None, 0)
        yield event("response.created", response=started)
        yield event("response.in_progress", response=started)
        calls: list[Call] = []
        async for piece in begun.pieces:
            answer.add(piece)
            passed = reader.push(piece.text)
            if piece.finish is not None:
                rest, calls = reader.finish()
                passed += rest
            is_first = not text and (passed.strip() or (piece.finish is not None and not calls))
            if is_first:
                item = {"id": at["item_id"], "type": "message", "role": "assistant", "status": "in_progress"}
                yield event("response.output_item.added", output_index=0, item={**item, "content": []})
                yield event("response.content_part.added", **at, part=_part("", Answer()))
                output.append(None)
            text += passed if output else ""
            if passed and output:
                told = logprobs_of(piece.chosen)
                yield event("response.output_text.delta", **at, delta=passed, logprobs=told)
        if output:
            yield event("response.output_text.done", **at, text=text, logprobs=logprobs_of(answer.chosen))
            yield event("response.content_part.done", **at, part=_part(text, answer))
            output[0] = _message(at["item_id"], text, answer)
            yield event("response.output_item.done", output_index=0, item=output[0])
        for call in calls:
            made = _call_item(call)
            for line in _call_events(event, made, len(output)):
                yield line
            output.append(made)
        response = _response(asked, body, output, answer, begun.num_prompt_tokens)
        yield event(f"response.{response['status']}", response=response)
    except ApiError as error:
        yield event("error", code=error.code or "server_error", message=error.message, param=error.param)


def _call_events(event: _Numbered, made: Object, index: int) -> list[bytes]:
    at = {"item_id": made["id"], "output_index": index}
    begun = {**made, "arguments": "", "status": "in_progress"}
    return [
        event("response.output_item.added", output_index=index, item=begun),
        event("response.function_call_arguments.delta", **at, delta=made["arguments"]),
        event("response.function_call_arguments.done", **at, arguments=made["arguments"], name=made["name"]),
        event("response.output_item.done", output_index=index, item=made),
    ]
