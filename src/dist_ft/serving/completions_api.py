"""Completions of raw text: requests, answers, streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence

from dist_ft.engine.protocol import Ask, Chosen, Prompt
from dist_ft.service.wire import ApiError, Json, Object, as_text, bad_request, new_id
from dist_ft.serving.asked import SAMPLING, Asked, check_members, flag_of, has_usage, int_of, model_of, sampling_of
from dist_ft.serving.gathered import DONE, Answer, Begun, gathered, line_of, usage_of

_KNOWN = ("model", "prompt", "stream", "stream_options", "max_tokens", "logprobs", "echo", *SAMPLING)
_REFUSED = {"suffix": "is not supported by this model", "best_of": "is not supported; use 'n'"}
_MAX_TOKENS = 16
_MAX_PROMPTS = 32
_LONGEST = 1 << 20


def read_completions(body: Object) -> list[Asked]:
    """Return what a body asks for: one request a prompt.

    Raises:
        ApiError: It cannot be answered.
    """
    if body.get("best_of") in (1, body.get("n")):
        body = {key: value for key, value in body.items() if key != "best_of"}
    check_members(body, _KNOWN, _REFUSED)
    model = model_of(body)
    logprobs = int_of(body, "logprobs", 0, 5)
    if flag_of(body, "echo"):
        if logprobs is not None:
            raise bad_request("'echo' with 'logprobs' is not supported; ask for one of them.", "echo")
        if any(prompt.text is None for prompt in _prompts(body)):
            raise bad_request("'echo' is not supported with token ids; give the prompt as text.", "echo")
    limit = int_of(body, "max_tokens", 1)
    sampling = sampling_of(body, _MAX_TOKENS if limit is None else limit, logprobs)
    is_streamed, usage = flag_of(body, "stream"), has_usage(body)
    return [Asked(model, Ask(new_id("cmpl-"), prompt, sampling), is_streamed, usage) for prompt in _prompts(body)]


def echo_of(body: Object, asked: Asked) -> str:
    """Return the text that stands before an answer."""
    return asked.ask.prompt.text or "" if flag_of(body, "echo") else ""


def _prompts(body: Object) -> list[Prompt]:
    value = body.get("prompt")
    if value is None:
        raise bad_request("Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter")
    parts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(parts) > _MAX_PROMPTS:
        raise bad_request(f"Invalid 'prompt': {len(parts)} prompts; expected {_MAX_PROMPTS} at most.", "prompt")
    return [_prompt(part) for part in parts]


def _prompt(value: Json) -> Prompt:
    if isinstance(value, list) and value:
        tokens = [token for token in value if isinstance(token, int) and not isinstance(token, bool)]
        if len(tokens) == len(value):
            return Prompt(tokens=tuple(tokens))
        raise bad_request("Invalid 'prompt': expected text, token ids, or a list of one of them.", "prompt")
    return Prompt(text=as_text(value, "prompt", _LONGEST))


async def completions_answer(all_asked: Sequence[Asked], all_begun: Sequence[Begun], echoes: Sequence[str]) -> Object:
    """Return whole completions; those of one prompt stand together."""
    choices: list[Json] = []
    every: list[Answer] = []
    for asked, begun, echo in zip(all_asked, all_begun, echoes, strict=True):
        for answer in await gathered(begun, asked.ask.sampling.n):
            choices.append(_choice(asked, len(choices), echo + answer.text, answer.chosen, answer.finish, 0))
            every.append(answer)
    usage = usage_of(sum(begun.num_prompt_tokens for begun in all_begun), every)
    return {**_head(all_asked[0]), "choices": choices, "usage": usage}


async def completions_stream(
    all_asked: Sequence[Asked], all_begun: Sequence[Begun], echoes: Sequence[str]
) -> AsyncIterator[bytes]:
    """Yield completions in pieces, prompt by prompt; all of them are made at once."""
    head, with_usage = _head(all_asked[0]), all_asked[0].has_usage
    usage: Object = {"usage": None} if with_usage else {}
    first, every = 0, []
    try:
        for asked, begun, echo in zip(all_asked, all_begun, echoes, strict=True):
            answers = [Answer(echo) for _ in range(asked.ask.sampling.n)]
            async for piece in begun.pieces:
                answer = answers[piece.choice]
                text = (echo if not answer.num_tokens else "") + piece.text
                offset = len(answer.text)
                answer.add(piece)
                choice = _choice(asked, first + piece.choice, text, piece.chosen, piece.finish, offset)
                yield line_of({**head, "choices": [choice], **usage})
            first += len(answers)
            every += answers
        if with_usage:
            total = usage_of(sum(begun.num_prompt_tokens for begun in all_begun), every)
            yield line_of({**head, "choices": [], "usage": total})
        yield DONE
    except ApiError as error:
        yield line_of(error.body())


def _head(asked: Asked) -> Object:
    return {
        "id": asked.ask.id, "object": "text_completion", "created": int(time.time()), "model": asked.model,
        "system_fingerprint": None,
    }  # fmt: skip


def _choice(asked: Asked, number: int, text: str, chosen: Sequence[Chosen], finish: str | None, offset: int) -> Object:
    return {
        "index": number, "text": text, "finish_reason": finish,
        "logprobs": None if asked.ask.sampling.logprobs is None else _logprobs(chosen, offset),
    }  # fmt: skip


def _logprobs(chosen: Sequence[Chosen], offset: int) -> Object:
    offsets = []
    for one in chosen:
        offsets.append(offset)
        offset += len(one.token.text)
    return {
        "tokens": [one.token.text for one in chosen], "token_logprobs": [one.token.logprob for one in chosen],
        "top_logprobs": [{other.text: other.logprob for other in one.top} for one in chosen],
        "text_offset": list[Json](offsets),
    }  # fmt: skip
