"""Any conversation, written in any format to any kind of file, reads back as the same conversation."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import read_rows
from dist_ft.records import Completion, Conversation, Message, Record
from tests.unit.data.sources.test_readers import WRITERS

KINDS = ("a.jsonl", "a.json", "wrapped.json", "a.csv", "a.tsv", "a.parquet", "stream.arrow", "a.feather", "a.csv.gz")
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAMES = st.text("abc_", min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(TEXT, VALUES, max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": draw(NAMES), "arguments": draw(ARGUMENTS)}}
    return {"id": draw(NAMES), **call} if draw(st.booleans()) else call


@st.composite
def turns(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(["developer", "user", "assistant", "tool"]))
    optional = {"name": NAMES}
    if role == "tool":
        optional["tool_call_id"] = NAMES
    if role == "assistant":
        optional |= {"reasoning_content": NAMES, "weight": st.sampled_from([0, 1])}
        optional["tool_calls"] = st.lists(calls(), min_size=1, max_size=2)
    return {"role": role, "content": draw(TEXT)} | draw(st.fixed_dictionaries({}, optional=optional))


ANSWER = st.builds(lambda text: {"role": "assistant", "content": text}, TEXT)
ASKED = st.builds(lambda text: {"role": "user", "content": text}, TEXT)
SYSTEM = st.builds(lambda text: {"role": "system", "content": text}, TEXT.filter(bool))
FUNCTION = st.fixed_dictionaries({"name": NAMES, "parameters": ARGUMENTS})
TOOLS = st.lists(st.builds(lambda function: {"type": "function", "function": function}, FUNCTION), max_size=2)
RICH = st.builds(
    lambda system, messages, answer, tools: Conversation([*system, *messages, answer], tuple(tools)),
    st.lists(SYSTEM, max_size=1), st.lists(turns(), max_size=4), ANSWER, TOOLS,
)  # fmt: skip
EXCHANGES = st.lists(st.tuples(ASKED, ANSWER), min_size=1, max_size=3).map(lambda pairs: [t for p in pairs for t in p])
PLAIN = st.builds(lambda s, messages: Conversation([*s, *messages]), st.lists(SYSTEM, max_size=1), EXCHANGES)


def as_messages(record: Conversation) -> dict[str, Any]:
    """As columns of text, which every kind of file can hold."""
    return {"messages": json.dumps(record.messages), "tools": json.dumps(record.tools)}


def as_openai(record: Conversation) -> dict[str, Any]:
    """Arguments as text, null content beside a call, and JSON only where columns cannot say it."""
    messages = [dict(message) for message in record.messages]
    for message in messages:
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
    return {"messages": messages, "tools": json.dumps(record.tools)}


def as_sharegpt(record: Conversation) -> dict[str, Any]:
    system, rest = _system(record)
    names = {"user": "human", "assistant": "gpt"}
    said = [{"from": names[turn["role"]], "value": turn["content"]} for turn in rest]
    return {"conversations": json.dumps(said), "system": system}


def as_alpaca(record: Conversation) -> dict[str, Any]:
    system, rest = _system(record)
    texts = [turn["content"] for turn in rest]
    history = [texts[at : at + 2] for at in range(0, len(texts) - 2, 2)]
    return {"instruction": texts[-2], "input": "", "output": texts[-1], "system": system, "history": history}


def _system(record: Conversation) -> tuple[str, list[Message]]:
    has_system = record.messages[0]["role"] == "system"
    return (record.messages[0]["content"], record.messages[1:]) if has_system else ("", record.messages)


def read_back(kind: str, rows: list[dict[str, Any]], **settings: Any) -> list[Record]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / kind
        WRITERS[kind](path, rows)
        return [row.record for row in read_rows(RowSource(source=str(path), **settings))]


def check(kind: str, write: Callable[[Any], dict[str, Any]], records: list[Any], **settings: Any) -> None:
    assert read_back(kind, [write(record) for record in records], **settings) == records


FORMATS: Mapping[str, tuple[Callable[[Any], dict[str, Any]], Any]] = {
    "messages": (as_messages, RICH),
    "sharegpt": (as_sharegpt, PLAIN),
    "prompt_completion": (vars, st.builds(Completion, TEXT, TEXT)),
    "text": (lambda record: {"text": record.completion}, st.builds(Completion, st.just(""), TEXT)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row_format", FORMATS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_record_reads_back_from_every_format_and_kind_of_file(
    kind: str, row_format: str, data: st.DataObject
) -> None:
    write, strategy = FORMATS[row_format]
    records = data.draw(st.lists(strategy, min_size=1, max_size=4))
    check(kind, write, records)
    check(kind, write, records, format=row_format)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "csv" not in kind and "tsv" not in kind])
@pytest.mark.parametrize(("write", "strategy"), [(as_openai, RICH), (as_alpaca, PLAIN)])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_nested_columns_read_back(kind: str, write: Callable[[Any], dict[str, Any]], strategy: Any, data: Any) -> None:
    check(kind, write, data.draw(st.lists(strategy, min_size=1, max_size=4)))
