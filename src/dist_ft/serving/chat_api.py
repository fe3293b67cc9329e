"""Chat completions: requests, answers, streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from dist_ft.engine.protocol import Ask, Chosen, Piece, Prompt
from dist_ft.service.wire import ApiError, Json, Object, bad_request, new_id
from dist_ft.serving.asked import (
    SAMPLING,
    Asked,
    check_members,
    chosen_of,
    flag_of,
    has_usage,
    int_of,
    model_of,
    sampling_of,
    schema_of,
    tools_in,
    turns_of,
)
from dist_ft.serving.found_calls import Call, CallReader
from dist_ft.serving.gathered import DONE, Answer, Begun, gathered, line_of, logprobs_of, usage_of

_KNOWN = (
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
    "tools", "tool_choice", "parallel_tool_calls", "response_format", *SAMPLING,
)  # fmt: skip
_REFUSED = {
    "functions": "is not supported; use 'tools'", "function_call": "is not supported; use 'tool_choice'",
    "audio": "is not supported by this model", "prediction": "is not supported by this model",
    "web_search_options": "is not supported by this model", "reasoning_effort": "is not supported by this model",
    "verbosity": "is not supported by this model", "modalities": "is not supported by this model",
}  # fmt: skip


def read_chat(body: Object) -> Asked:
    """Return what a body asks for.

    Raises:
        ApiError: It cannot be answered.
    """
    if body.get("modalities") == ["text"]:
        body = {key: value for key, value in body.items() if key != "modalities"}
    check_members(body, _KNOWN, _REFUSED)
    model = model_of(body)
    tools = tools_in(body)
    forced, is_named = chosen_of(body, tools)
    top = int_of(body, "top_logprobs", 0, 20)
    has_logprobs = flag_of(body, "logprobs")
    if top is not None and not has_logprobs:
        raise bad_request("'top_logprobs' is only allowed when 'logprobs' is enabled.", "top_logprobs")
    limits = [int_of(body, key, 1) for key in ("max_completion_tokens", "max_tokens")]
    sampling = sampling_of(body, limits[0] or limits[1], (top or 0) if has_logprobs else None)
    flag_of(body, "parallel_tool_calls")
    return Asked(
        model=model,
        ask=Ask(
            new_id("chatcmpl-"), Prompt(turns_of(body.get("messages"), "messages"), tools=tools), sampling,
            grammar=forced or schema_of(body.get("response_format"), "response_format"), keeps_marks=bool(tools),
        ),
        is_streamed=flag_of(body, "stream"),
        has_usage=has_usage(body),
        functions=frozenset(tool["function"]["name"] for tool in tools),
        is_named=is_named,
    )  # fmt: skip


async def chat_answer(asked: Asked, begun: Begun) -> Object:
    """Return a whole completion."""
    answers = await gathered(begun, asked.ask.sampling.n)
    choices: list[Json] = [_choice(asked, number, answer) for number, answer in enumerate(answers)]
    head = _head(asked, "chat.completion")
    return {**head, "choices": choices, "usage": usage_of(begun.num_prompt_tokens, answers)}


def _choice(asked: Asked, number: int, answer: Answer) -> Object:
    reader = CallReader(asked.functions)
    text = reader.push(answer.text)
    rest, calls = reader.finish()
    text += rest
    message: Object = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text.strip() or None, "tool_calls": [_call(call) for call in calls]}
    return {
        "index": number, "message": message, "finish_reason": _finish(asked, answer.finish, calls),
        "logprobs": _logprobs(asked, answer.chosen),
    }  # fmt: skip


def _finish(asked: Asked, finish: str | None, calls: list[Call]) -> str | None:
    return "tool_calls" if calls and finish == "stop" and not asked.is_named else finish


def _logprobs(asked: Asked, chosen: Sequence[Chosen]) -> Object | None:
    if asked.ask.sampling.logprobs is None:
        return None
    return {"content": logprobs_of(chosen), "refusal": None}


def _call(call: Call) -> Object:
    # Nine letters and digits: Mistral's template takes no other id when the call comes back.
    return {"id": new_id("", 9), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _head(asked: Asked, kind: str) -> Object:
    return {
        "id": asked.ask.id, "object": kind, "created": int(time.time()), "model": asked.model,
        "system_fingerprint": None, "service_tier": "default",
    }  # fmt: skip


async def chat_stream(asked: Asked, begun: Begun) -> AsyncIterator[bytes]:
    """Yield a completion in pieces."""
    head = _head(asked, "chat.completion.chunk")
    usage: Object = {"usage": None} if asked.has_usage else {}
    answers = [Answer() for _ in range(asked.ask.sampling.n)]
    readers = [CallReader(asked.functions) for _ in answers]

    def chunk(number: int, delta: Object, finish: str | None = None, logprobs: Object | None = None) -> bytes:
        choice: Object = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return line_of({**head, "choices": [choice], **usage})

    try:
        for number in range(len(answers)):
            yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
        async for piece in begun.pieces:
            answers[piece.choice].add(piece)
            told = piece.chosen
            for delta, finish in _deltas(asked, readers[piece.choice], piece):
                yield chunk(piece.choice, delta, finish, _logprobs(asked, told) if told else None)
                told = ()
        if asked.has_usage:
            yield line_of({**head, "choices": [], "usage": usage_of(begun.num_prompt_tokens, answers)})
        yield DONE
    except ApiError as error:
        yield line_of(error.body())


def _deltas(asked: Asked, reader: CallReader, piece: Piece) -> list[tuple[Object, str | None]]:
    """Return what a piece adds to an answer."""
    text = reader.push(piece.text)
    calls: list[Call] = []
    if piece.finish is not None:
        rest, calls = reader.finish()
        text += rest
    found: list[tuple[Object, str | None]] = [({"content": text}, None)] if text else []
    for number, call in enumerate(calls):
        made = _call(call)
        begun: Object = {**made, "index": number, "function": {"name": call.name, "arguments": ""}}
        found += [
            ({"tool_calls": [begun]}, None),
            ({"tool_calls": [{"index": number, "function": {"arguments": call.arguments}}]}, None),
        ]
    if piece.finish is not None:
        found.append(({}, _finish(asked, piece.finish, calls)))
    return found
