"""What is said between an engine and whoever asks it. Imports no torch, because replicas and ingress speak it, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_ft.records import Message


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the ranges are OpenAI's.

    Attributes:
        max_tokens: Most tokens of an answer; None is what the engine allows.
        temperature: 0 takes the likeliest token each time.
        top_p: Draw among the likeliest tokens that together have this probability.
        presence_penalty: Taken from the logit of a token that the answer holds.
        frequency_penalty: Taken for each time that it does.
        logit_bias: Added to the logits of tokens, as pairs of id and bias.
        seed: Draws the same answer again, whoever else is in the batch.
        stop: Texts before which an answer ends.
        logprobs: How many likeliest tokens to tell at each place; None for no probabilities at all.
        n: Number of answers.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True)
class Prompt:
    """What an answer continues: turns, raw text, or tokens. Exactly one of the three is given.

    Attributes:
        messages: Turns, rendered with the model's template as in training.
        text: Raw text.
        tokens: Token ids.
        tools: Functions for the template.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        id: Names the request; the client chooses it.
        prompt: What to continue.
        sampling: How.
        adapter: Directory of an adapter of the base model; None for the base itself.
        grammar: JSON schema, as JSON text, that the answer has to fit.
        keeps_marks: Whether special tokens stay in the text; calls are marked by some.
    """

    id: str
    prompt: Prompt
    sampling: Sampling
    adapter: str | None = None
    grammar: str | None = None
    keeps_marks: bool = False


@dataclass(frozen=True)
class Likely:
    """A token with its log-probability.

    Attributes:
        text: The token alone; of half a character a replacement mark.
        logprob: Natural logarithm of its probability, before temperature and penalties.
        utf8: Its bytes.
    """

    text: str
    logprob: float
    utf8: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """A token of an answer, and the likeliest ones at its place."""

    token: Likely
    top: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Accepted:
    """The request waits for its turn, or has begun."""

    id: str
    num_prompt_tokens: int


@dataclass(frozen=True)
class Refused:
    """The request got no answer, or will get no more.

    Attributes:
        status: HTTP status.
        message: What a person reads.
        param: The parameter that is wrong, if one is.
        code: Machine-readable cause.
    """

    id: str
    status: int
    message: str
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        choice: Number of the answer, from 0.
        text: Whole characters; none of a text that may yet become a stop.
        num_tokens: Tokens of the answer so far.
        chosen: Tokens since the last piece, if probabilities were asked for.
        finish: `stop` or `length` in the last piece.
    """

    id: str
    choice: int
    text: str
    num_tokens: int
    chosen: tuple[Chosen, ...] = ()
    finish: str | None = None


Event = Accepted | Refused | Piece
EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in (Accepted, Refused, Piece)}


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is made of.

    Attributes:
        config: A `Config` as JSON values; `model` and `data.chat_template` count.
        merged: Directory of an adapter that is folded into the base model (DoRA, which cannot be mixed).
        max_rows: Answers that are made at once.
        cache_bytes: Memory for keys and values.
        max_waiting: Requests that may wait.
        max_adapters: Adapters that are kept in memory.
        num_threads: Threads of torch; 0 for a thread a core.
    """

    config: dict[str, Any]
    merged: str | None = None
    max_rows: int = 16
    cache_bytes: int = 2 << 30
    max_waiting: int = 64
    max_adapters: int = 16
    num_threads: int = 0
