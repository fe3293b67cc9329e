"""Calls of functions, in every spelling: nothing is made up for them, and the calls of one answer are one turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.formats import read_record
from dist_ft.data.rows.scan import read_rows
from dist_ft.errors import DataError
from dist_ft.records import Conversation, Message

ASKED = {"role": "user", "content": "Weather?"}
SAID = {"role": "assistant", "content": "Let me look."}
DONE = {"role": "assistant", "content": "Rain."}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def call_turn(city: str, role: str = "tool_call", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": json.dumps(call(city)["function"]), **more}


def openai_turn(city: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(city)], **more}


def result(text: str, role: str = "tool_response") -> dict[str, Any]:
    return {"role": role, "content": text}


def messages(*turns: Any) -> list[Message]:
    record = read_record({"messages": [ASKED, *turns]})
    assert isinstance(record, Conversation)
    return record.messages[1:]


def calls_of(text: str, *cities: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [call(city) for city in cities], **more}


TOOL_RESULT = {"role": "tool", "content": "wet"}


@pytest.mark.parametrize("one", [call_turn, openai_turn, lambda city: call_turn(city, "function_call")])
def test_calls_in_turns_of_their_own_are_one_turn(one: Callable[[str], dict[str, Any]]) -> None:
    wet = result("wet")
    assert messages(SAID, one("Oslo"), one("Rome"), wet, wet, DONE) == [
        calls_of("Let me look.", "Oslo", "Rome"), TOOL_RESULT, TOOL_RESULT, DONE,
    ]  # fmt: skip
    assert messages(one("Oslo"), one("Rome"), wet, wet, DONE) == [
        calls_of("", "Oslo", "Rome"), TOOL_RESULT, TOOL_RESULT, DONE,
    ]  # fmt: skip
    # A call behind a result is another answer: the model has seen the result.
    assert messages(SAID, one("Oslo"), wet, one("Rome"), one("Bonn"), wet, DONE) == [
        calls_of("Let me look.", "Oslo"), TOOL_RESULT, calls_of("", "Rome", "Bonn"), TOOL_RESULT, DONE,
    ]  # fmt: skip
    assert messages({**SAID, "weight": 0}, {**one("Oslo"), "weight": 0}, wet, DONE) == [
        calls_of("Let me look.", "Oslo", weight=0), TOOL_RESULT, DONE,
    ]  # fmt: skip
    with pytest.raises(DataError, match="turn 2: the calls and what the assistant says right before"):
        messages({**SAID, "weight": 0}, one("Oslo"), wet, DONE)


def test_answers_in_a_row_stay_apart() -> None:
    assert messages(SAID, DONE) == [SAID, DONE]
    named = {**openai_turn("Oslo"), "name": "Ann"}
    assert len(messages(SAID, named)) == len(messages({**SAID, "name": "Bob"}, named)) == 2
    assert messages({**SAID, "name": "Ann"}, named) == [calls_of("Let me look.", "Oslo", name="Ann")]
    assert messages(SAID, call_turn("Oslo", name="weather")) == [calls_of("Let me look.", "Oslo")]
    thought = {**openai_turn("Oslo"), "reasoning": "hm"}
    assert messages(SAID, thought)[1]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    "spelling",
    [
        {"name": "weather", "parameters": {"city": "Oslo"}},
        {"name": "weather", "parameters": '{"city": "Oslo"}'},
        {"name": "weather", "arguments": {"city": "Oslo"}, "parameters": {"city": "Oslo"}},
        {"name": "weather", "arguments": {"city": "Oslo"}, "parameters": None},
    ],
)
def test_parameters_of_a_call_are_its_arguments(spelling: dict[str, Any]) -> None:
    for turn in (
        {"role": "assistant", "tool_calls": [{"function": spelling}]}, {"role": "assistant", "tool_calls": [spelling]},
        {"role": "tool_call", "content": json.dumps(spelling)}, {"role": "assistant", "function_call": spelling},
    ):  # fmt: skip
        assert messages(turn) == [calls_of("", "Oslo")]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"name": "weather"}, "the call of 'weather' has no `arguments` (found nothing else); write {} for none"),
        ({"name": "weather", "arguments": None}, "has no `arguments`"),
        ({"name": "weather", "args": {"city": "Oslo"}}, "has no `arguments` (found args)"),
        ({"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}, "`arguments` and `parameters` of 'f' differ"),
        ({"function": {"name": "f", "arguments": {}}, "arguments": {"a": 1}}, "stands beside `function`"),
        ({"type": "custom", "function": {"name": "f", "arguments": {}}}, "a call is of type 'custom'"),
        ({"name": "f", "arguments": {}, "loss": False}, "`loss` of a call is False"),
        ({"name": "f", "arguments": '{"a": 1, "a": 2}'}, "key 'a' stands twice"),
    ],
)
def test_nothing_is_made_up_for_a_call(call: dict[str, Any], says: str) -> None:
    for turn in (
        {"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "tool_calls": json.dumps([call])},
        {"role": "assistant", "tool_calls": [json.dumps(call)]}, {"role": "tool_call", "content": json.dumps(call)},
    ):  # fmt: skip
        with pytest.raises(DataError) as caught:
            messages(turn)
        assert says in str(caught.value)


def test_a_call_without_arguments_says_so() -> None:
    for none in ({}, "", "{}"):
        (turn,) = messages({"role": "assistant", "tool_calls": [{"name": "now", "arguments": none}]})
        assert turn["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}
    assert messages({"role": "tool_call", "content": {"name": "now", "arguments": {}}, "tool_call_id": "7"})[0][
        "tool_calls"
    ] == [{"id": "7", "type": "function", "function": {"name": "now", "arguments": {}}}]


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": ["integer", "null"]}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
EXPECTED = Conversation([ASKED, calls_of("Let me look.", "Oslo"), TOOL_RESULT, DONE], (TOOL,))
TURNS = [ASKED, {**SAID, "tool_calls": [call("Oslo")]}, {"role": "tool", "content": [{"type": "text", "text": "wet"}]}]


def as_text(value: Any, depth: int) -> Any:
    """The value with all objects from a depth on as JSON text."""
    if isinstance(value, dict):
        return json.dumps(value) if depth == 0 else {key: as_text(inner, depth - 1) for key, inner in value.items()}
    return [as_text(inner, depth) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("depth", range(6))
def test_json_text_in_the_place_of_an_object_is_parsed(depth: int) -> None:
    row = {"messages": as_text([*TURNS, DONE], depth), "tools": as_text([TOOL], depth)}
    assert read_record(row) == EXPECTED
    assert read_record({key: json.dumps(value) for key, value in row.items()}) == EXPECTED


def test_text_that_looks_like_json_stays_text() -> None:
    for text in ('{"type": "text", "text": "a"}', '[{"role": "user"}]', "[1]"):
        assert messages({"role": "assistant", "content": text})[0]["content"] == text
        assert messages({"role": "tool", "content": text}, DONE)[0]["content"] == text
    assert messages({"role": "assistant", "content": ['{"a": 1}', "b"]})[0]["content"] == '{"a": 1}b'


def test_values_of_arrows_json_type_are_what_they_hold(tmp_path: Path) -> None:
    """As `datasets` 5.2 writes lists of mixed objects (`List(Json())`), to Parquet and with `save_to_disk`."""

    def stored(values: Any) -> pa.Array:
        return pa.array([json.dumps(value) for value in values], pa.json_())

    turns = [{"role": "user", "content": "[1]"}, *TURNS[1:], DONE]
    offsets = pa.array([0, len(turns)], pa.int32())
    contents = pa.StructArray.from_arrays(
        [pa.array([turn["role"] for turn in turns]), stored([turn["content"] for turn in turns]),
         pa.ListArray.from_arrays(pa.array([0, 0, 1, 1, 1], pa.int32()), stored([call("Oslo")]))],
        names=["role", "content", "tool_calls"],
    )  # fmt: skip
    tools = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), stored([TOOL]))
    for values in (stored(turns), contents):
        table = pa.table({"messages": pa.ListArray.from_arrays(offsets, values), "tools": tools})
        pq.write_table(table, tmp_path / "a.parquet")
        with pa.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
            writer.write_table(table)
        for name in ("a.parquet", "b.arrow"):
            (row,) = read_rows(RowSource(source=str(tmp_path / name)))
            assert row.record == Conversation([{"role": "user", "content": "[1]"}, *EXPECTED.messages[1:]], (TOOL,))


def test_bad_json_of_arrows_json_type_is_a_bad_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": pa.array(["[{"], pa.json_())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 1: a value of type arrow\.json is not usable JSON"):
        list(read_rows(RowSource(source=str(tmp_path / "a.parquet"))))
