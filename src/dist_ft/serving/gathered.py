"""Gathers the pieces of an answer, and writes streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from dist_ft.engine.protocol import Accepted, Chosen, Event, Likely, Piece, Refused
from dist_ft.service.wire import ApiError, Json, Object

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer as far as it is known."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    num_tokens: int = 0
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self.text += piece.text
        self.chosen += piece.chosen
        self.num_tokens = piece.num_tokens
        self.finish = piece.finish


@dataclass(frozen=True)
class Begun:
    """A request that was accepted.

    Attributes:
        num_prompt_tokens: Of its prompt.
        pieces: What is still to come.
    """

    num_prompt_tokens: int
    pieces: AsyncIterator[Piece]


async def begin(events: AsyncIterator[Event]) -> Begun:
    """Wait until a request is accepted.

    Raises:
        ApiError: It is refused.
    """
    first = await anext(events)
    if isinstance(first, Refused):
        raise error_of(first)
    assert isinstance(first, Accepted), "an engine says first whether it takes a request"
    return Begun(first.num_prompt_tokens, _pieces(events))


async def _pieces(events: AsyncIterator[Event]) -> AsyncIterator[Piece]:
    async for event in events:
        if isinstance(event, Refused):
            raise error_of(event)
        assert isinstance(event, Piece)
        yield event


async def gathered(begun: Begun, num_answers: int) -> list[Answer]:
    """Return whole answers.

    Raises:
        ApiError: The engine was lost.
    """
    answers = [Answer() for _ in range(num_answers)]
    async for piece in begun.pieces:
        answers[piece.choice].add(piece)
    return answers


def error_of(refused: Refused) -> ApiError:
    """Return the error of a refusal."""
    kind = "server_error" if refused.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if refused.status == 429 else kind
    error = ApiError(refused.status, refused.message, refused.param, refused.code, kind)
    if refused.status in (429, 503):
        error.headers["retry-after"] = "1"
    return error


def usage_of(num_prompt_tokens: int, answers: Sequence[Answer]) -> Object:
    """Return the numbers of tokens."""
    made = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt_tokens, "completion_tokens": made, "total_tokens": num_prompt_tokens + made,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0, "audio_tokens": 0, "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
        },
    }  # fmt: skip


def logprobs_of(chosen: Sequence[Chosen]) -> list[Json]:
    """Return tokens with their log-probabilities, as chat and responses tell them."""
    return [{**_likely(one.token), "top_logprobs": [_likely(other) for other in one.top]} for one in chosen]


def _likely(token: Likely) -> Object:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.utf8)}


def line_of(value: Object, event: str | None = None) -> bytes:
    """Return an event of a stream."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
