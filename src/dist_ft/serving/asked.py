"""Reads what the three kinds of requests have in common: limits, sampling, formats, functions."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.data.rows.conversation import read_turns
from dist_ft.data.rows.tool_calls import tools_of
from dist_ft.engine.protocol import Ask, Sampling
from dist_ft.errors import DataError
from dist_ft.records import Message
from dist_ft.service.wire import ApiError, Json, Object, as_int, as_object, as_text, bad_request, shown, whole_number

IGNORED = (
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
)  # fmt: skip
"""Members that are taken and mean nothing here."""
SAMPLING = ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop")
_MAX_TOOLS = 128
_MAX_STOPS = 4
_MAX_TOKENS = 1 << 24
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Asked:
    """A request as it is answered.

    Attributes:
        model: Name of the model.
        ask: What the engine is asked.
        is_streamed: Whether the answer comes in pieces.
        has_usage: Whether a stream ends with the numbers of tokens.
        functions: Names of the functions that may be called.
        is_named: Whether one function has to be called, which ends an answer with `stop`.
    """

    model: str
    ask: Ask
    is_streamed: bool
    has_usage: bool = False
    functions: frozenset[str] = frozenset()
    is_named: bool = False


def check_members(body: Object, known: Sequence[str], refused: dict[str, str]) -> None:
    """Refuse members that have no meaning here, and those that ask for what is not done.

    Raises:
        ApiError: There is one.
    """
    for key, value in body.items():
        if key in refused and value not in (None, False, [], {}):
            raise ApiError(400, f"Unsupported parameter: '{key}' {refused[key]}.", key, "unsupported_parameter")
        if key not in known and key not in refused and key not in IGNORED:
            raise ApiError(400, f"Unrecognized request argument supplied: {key[:100]}", key[:100], "unknown_parameter")
    if body.get("metadata") is not None:
        as_object(body["metadata"], "metadata")


def model_of(body: Object) -> str:
    """Return the name of the model.

    Raises:
        ApiError: There is none.
    """
    if body.get("model") is None:
        raise bad_request("you must provide a model parameter", "model", "missing_required_parameter")
    return as_text(body["model"], "model", 500)


def flag_of(body: Object, key: str) -> bool:
    """Return a member that is true or false; false if it is missing.

    Raises:
        ApiError: It is something else.
    """
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"Invalid type for '{key}': expected a boolean, but got {shown(value)} instead.", key)
    return bool(value)


def has_usage(body: Object) -> bool:
    """Return whether a stream shall end with the numbers of tokens.

    Raises:
        ApiError: `stream_options` stands without `stream`, or is something else.
    """
    if body.get("stream_options") is None:
        return False
    if not flag_of(body, "stream"):
        raise bad_request("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    return flag_of(as_object(body["stream_options"], "stream_options"), "include_usage")


def sampling_of(body: Object, max_tokens: int | None, logprobs: int | None) -> Sampling:
    """Return how an answer is drawn.

    Raises:
        ApiError: A member is out of its range.
    """
    seed = body.get("seed")
    return Sampling(
        max_tokens=max_tokens,
        temperature=_number(body, "temperature", 0, 2, 1.0),
        top_p=_number(body, "top_p", 0, 1, 1.0),
        presence_penalty=_number(body, "presence_penalty", -2, 2, 0.0),
        frequency_penalty=_number(body, "frequency_penalty", -2, 2, 0.0),
        logit_bias=_bias(body.get("logit_bias")),
        seed=secrets.randbits(63) if seed is None else as_int(seed, "seed", -(2**63), 2**63 - 1),
        stop=_stops(body.get("stop")),
        logprobs=logprobs,
        n=int_of(body, "n", 1, 128) or 1,
    )


def int_of(body: Object, key: str, low: int, high: int = _MAX_TOKENS) -> int | None:
    """Return a whole number; None if it is missing.

    Raises:
        ApiError: It is something else.
    """
    return None if body.get(key) is None else as_int(body[key], key, low, high)


def _number(body: Object, key: str, low: float, high: float, default: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad_request(
            f"Invalid value for '{key}': {shown(value)}, expected a number from {low:g} to {high:g}.", key
        )
    return float(value)


def _bias(value: Json) -> tuple[tuple[int, float], ...]:
    found = {} if value is None else as_object(value, "logit_bias")
    biases: list[tuple[int, float]] = []
    for token, bias in found.items():
        number = whole_number(token)
        if number is None:
            raise bad_request(
                f"Invalid key in 'logit_bias': {token[:40]}. You should only be submitting token ids.", "logit_bias"
            )
        biases.append((number, _number({"logit_bias": bias}, "logit_bias", -100, 100, 0.0)))
    return tuple(biases)


def _stops(value: Json) -> tuple[str, ...]:
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if len(stops) > _MAX_STOPS:
        raise bad_request(f"Invalid 'stop': {len(stops)} texts; expected {_MAX_STOPS} at most.", "stop")
    return tuple(as_text(stop, "stop", 1000) for stop in stops)


def turns_of(value: Json, param: str) -> tuple[Message, ...]:
    """Return turns as in training.

    Raises:
        ApiError: They are no turns.
    """
    if not isinstance(value, list) or not value:
        raise bad_request(f"Invalid '{param}': expected a list of turns that is not empty.", param)
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise bad_request(f"Invalid '{param}[{number}]': expected an object with a role.", param)
    try:
        return tuple(read_turns(param, [_plain(turn) for turn in value if isinstance(turn, dict)]))
    except DataError as error:
        raise bad_request(f"Invalid '{param}': {error}", param) from error


def _plain(turn: Object) -> dict[str, Any]:
    """Return a turn without what clients send back of an answer and templates do not know."""
    return {k: v for k, v in turn.items() if v is not None and k not in ("refusal", "audio", "annotations")}


def tools_in(body: Object) -> tuple[dict[str, Any], ...]:
    """Return the functions that may be called, none with `tool_choice` none.

    Raises:
        ApiError: They are no functions.
    """
    if body.get("tools") is None:
        if body.get("tool_choice") not in (None, "none", "auto"):
            raise bad_request("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
        return ()
    try:
        tools = tools_of({"tools": body["tools"]})
    except DataError as error:
        raise bad_request(f"Invalid 'tools': {error}", "tools") from error
    if len(tools) > _MAX_TOOLS:
        raise bad_request(f"Invalid 'tools': {len(tools)} functions; expected {_MAX_TOOLS} at most.", "tools")
    return () if body.get("tool_choice") == "none" else tools


def chosen_of(body: Object, tools: Sequence[dict[str, Any]]) -> tuple[str | None, bool]:
    """Return the schema of a call that is forced, and whether its function is named.

    Raises:
        ApiError: `tool_choice` is something else, or names no function.
    """
    choice = body.get("tool_choice")
    if choice in (None, "auto", "none"):
        return None, False
    named: Json = None
    if isinstance(choice, dict):
        inner = choice.get("function")
        named = inner.get("name") if isinstance(inner, dict) else choice.get("name")
    elif choice != "required":
        raise bad_request(f"Invalid value for 'tool_choice': {shown(choice)}.", "tool_choice")
    functions = [tool["function"] for tool in tools if choice == "required" or tool["function"]["name"] == named]
    if not functions:
        raise bad_request(f"Tool choice {shown(named)} not found in 'tools'.", "tool_choice")
    schemas = [
        {
            "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
            "properties": {
                "name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"},
            },
        }
        for function in functions
    ]  # fmt: skip
    return json.dumps(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}), choice != "required"


def schema_of(value: Json, param: str) -> str | None:
    """Return the JSON schema that an answer has to fit, from `response_format` or `text.format`.

    Raises:
        ApiError: It is something else.
    """
    if value is None:
        return None
    form = as_object(value, param)
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind != "json_schema":
        raise bad_request(f"Invalid value for '{param}.type': {shown(kind)}.", f"{param}.type")
    inner = form if "schema" in form else as_object(form.get("json_schema"), f"{param}.json_schema")
    if not _NAME.fullmatch(as_text(inner.get("name"), f"{param}.json_schema.name", 64)):
        raise bad_request(
            f"Invalid '{param}.json_schema.name': expected letters, digits, '_' and '-'.", f"{param}.json_schema.name"
        )
    return json.dumps(as_object(inner.get("schema"), f"{param}.json_schema.schema"))
