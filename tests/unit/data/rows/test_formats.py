"""What a row says: every common format becomes the same record, and what is not understood is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from dist_ft.config.data_sections import Column, PromptFormat, RowSource
from dist_ft.data.rows import formats
from dist_ft.data.rows.formats import read_record
from dist_ft.data.rows.scan import reading_key
from dist_ft.data.sources.parts import whole
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.errors import DataError
from dist_ft.records import Completion, Conversation

ASKED = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def talk(*messages: dict[str, Any], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(list(messages), tools)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, ANSWER], "id": 5, "prompt": "hi"}, talk(ASKED, ANSWER)),
        ({"messages": json.dumps([ASKED, ANSWER])}, talk(ASKED, ANSWER)),
        ({"messages": [ASKED, ANSWER], "tools": [TOOL]}, talk(ASKED, ANSWER, tools=(TOOL,))),
        ({"messages": [ASKED, ANSWER], "tools": json.dumps([TOOL])}, talk(ASKED, ANSWER, tools=(TOOL,))),
        ({"messages": [ASKED, ANSWER], "functions": [TOOL["function"]]}, talk(ASKED, ANSWER, tools=(TOOL,))),
        ({"messages": [ASKED, ANSWER], "tools": None}, talk(ASKED, ANSWER)),
        ({"messages": [ASKED, ANSWER], "tools": ""}, talk(ASKED, ANSWER)),
        ({"messages": [ASKED, ANSWER], "system": "be kind"}, talk(system("be kind"), ASKED, ANSWER)),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, talk(ASKED, ANSWER)),
        (
            {"conversations": [{"from": "human", "value": "hi"}, ANSWER], "system": "s", "tools": [TOOL]},
            talk(system("s"), ASKED, ANSWER, tools=(TOOL,)),
        ),
        ({"prompt": "one", "completion": " two"}, Completion("one", " two")),
        ({"prompt": [ASKED], "completion": [ANSWER]}, talk(ASKED, ANSWER)),
        (
            {"prompt": [ASKED, ANSWER, ASKED], "completion": [ANSWER]},
            talk(ASKED, {**ANSWER, "weight": 0}, ASKED, ANSWER),
        ),
        ({"instruction": "hi", "input": "", "output": "hello", "text": "### hi"}, talk(ASKED, ANSWER)),
        ({"instruction": "hi", "output": "hello"}, talk(ASKED, ANSWER)),
        ({"instruction": "h", "input": "i", "output": "hello"}, talk({**ASKED, "content": "h\ni"}, ANSWER)),
        (
            {"instruction": "hi", "output": "hello", "system": "s", "history": [["a", "b"]]},
            talk(system("s"), {**ASKED, "content": "a"}, {**ANSWER, "content": "b"}, ASKED, ANSWER),
        ),
        ({"text": "prose", "meta": 1}, Completion("", "prose")),
    ],
)  # fmt: skip
def test_every_format_is_recognised_by_its_keys(row: dict[str, Any], expected: Any) -> None:
    assert read_record(row) == expected


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "Assistant", "content": "x"}, {"role": "assistant", "content": "x"}),
        ({"role": " model ", "content": "x"}, {"role": "assistant", "content": "x"}),
        ({"role": "developer", "content": "x"}, {"role": "developer", "content": "x"}),
        ({"role": "observation", "content": "x"}, {"role": "tool", "content": "x"}),
        ({"role": "function", "name": "f", "content": "x"}, {"role": "tool", "content": "x", "name": "f"}),
        (
            {"role": "tool", "tool_call_id": "1", "name": "f", "content": "x"},
            {"role": "tool", "content": "x", "name": "f", "tool_call_id": "1"},
        ),
        ({"role": "user", "name": "Ann", "content": "x", "weight": 0}, {"role": "user", "content": "x", "name": "Ann"}),
        ({"role": "assistant", "content": "x", "weight": 0}, {"role": "assistant", "content": "x", "weight": 0}),
        ({"role": "assistant", "content": "x", "weight": 1.0}, {"role": "assistant", "content": "x", "weight": 1}),
        ({"role": "assistant", "content": "x", "weight": None, "name": None}, {"role": "assistant", "content": "x"}),
        (
            {"role": "assistant", "content": "x", "reasoning_content": "so"},
            {"role": "assistant", "content": "x", "reasoning_content": "so"},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]},
            {"role": "user", "content": "abc"},
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "1"}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": '{"at": "x"}'}}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "t", "tool_calls": [{"name": "look", "arguments": {"at": "x"}}]},
            {"role": "assistant", "content": "t", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"at": "x"}'}},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "x"}}'},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        ({"role": "assistant", "content": "x", "tool_calls": []}, {"role": "assistant", "content": "x"}),
    ],
)  # fmt: skip
def test_a_turn_is_read_as_openai_spells_it(turn: dict[str, Any], expected: dict[str, Any]) -> None:
    record = read_record({"messages": [turn, ANSWER]})
    assert isinstance(record, Conversation)
    assert record.messages[0] == expected


def assistant(**keys: Any) -> dict[str, Any]:
    return {"messages": [ASKED, {"role": "assistant", **keys}]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "found keys [], expected `messages` (messages)"),
        ({"question": "a", "answer": "b"}, "found keys ['answer', 'question'], expected"),
        ({str(n): n for n in range(50)}, "and 38 more"),
        ({"messages": [ASKED, ANSWER], "conversations": [ASKED]}, "fits messages and sharegpt"),
        ({"messages": "[{"}, "`messages`: '[{' is not valid JSON"),
        ({"messages": [ASKED]}, "no assistant turn"),
        ({"messages": [system("a"), ASKED, ANSWER], "system": "b"}, "two system prompts"),
        ({"messages": [ASKED, ANSWER], "tools": {"name": "f"}}, "expected a list of functions"),
        ({"messages": [ASKED, ANSWER], "tools": [{"type": "function"}]}, "tool 0"),
        ({"messages": [ASKED, ANSWER], "tools": ["f"]}, "tool 0"),
        ({"messages": [ASKED, ANSWER], "tools": [TOOL], "functions": [TOOL]}, "keep `tools`"),
        (assistant(), "turn 1: the content is None"),
        (assistant(content={"a": 1}), "turn 1: the content is {'a': 1}"),
        (assistant(content=[{"type": "input_audio", "input_audio": {}}]), "only text can be trained"),
        (assistant(content="x", weight=0.5), "`weight` is 0.5, expected 0 or 1"),
        (assistant(content="x", weight="1"), "`weight` is '1'"),
        (assistant(content="x", weight=float("nan")), "`weight` is nan"),
        (assistant(content="x", name=5), "`name` is 5, expected text"),
        (assistant(tool_calls=[{"function": {"arguments": "{}"}}]), "expected a function with name and arguments"),
        (assistant(tool_calls=[{"name": "f", "arguments": "[1]"}]), "arguments of 'f' are [1], expected an object"),
        (assistant(tool_calls=[{"name": "f", "arguments": "{"}]), "arguments of 'f': '{' is not valid JSON"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"a": float("inf")}}]), "inf is no number"),
        (assistant(tool_calls=[{"name": "f", "arguments": {"a\ud83d": 1}}]), "half a character"),
        (assistant(tool_calls=[{"name": "f", "arguments": {}, "id": 3}]), "id of a call is 3"),
        (assistant(tool_calls=[{"name": "f"}], function_call={"name": "f"}), "keep `tool_calls`"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}, ANSWER]}, "only an assistant calls"),
        ({"messages": [{**ASKED, "weight": 1}, ANSWER]}, "only assistant turns are trained"),
        ({"conversations": [{"from": "function_call", "value": "look(x)"}]}, "turn 0: the call: 'look(x)'"),
        ({"prompt": "a", "completion": [ANSWER]}, "both text or both lists of turns"),
        ({"prompt": [ASKED], "completion": []}, "`completion` is [], expected a list of turns"),
        ({"instruction": ["a"], "output": "b"}, "`instruction` is ['a'], expected text"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "`history` 0"),
        ({"instruction": "a", "output": "b", "history": "a"}, "`history` is 'a'"),
        ({"text": ["a"]}, "`text` is ['a'], expected text"),
        ({"text": "\ud83d"}, "half a character"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_record(row)
    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_named_format_wins_over_other_keys() -> None:
    row = {"messages": [ASKED, ANSWER], "text": "prose", "prompt": "a", "completion": "b"}
    assert read_record(row, "text") == Completion("", "prose")
    assert read_record(row, "prompt_completion") == Completion("a", "b")


def test_a_named_format_says_what_it_lacks() -> None:
    with pytest.raises(DataError, match=r"found keys \['output'\], but format alpaca needs `instruction`"):
        read_record({"output": "x"}, "alpaca")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"dialog": [ASKED, ANSWER]}, {"messages": "dialog"}, talk(ASKED, ANSWER)),
        ({"q": "hi", "a": "hello", "text": "x"}, {"instruction": "q", "output": "a"}, talk(ASKED, ANSWER)),
        ({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"}, Completion("a", "b")),
        ({"text": "no", "body": "yes"}, {"text": "body"}, Completion("", "yes")),
    ],
)
def test_columns_name_the_files_keys(row: dict[str, Any], columns: dict[str, str], expected: Any) -> None:
    assert read_record(row, "auto", columns) == expected


def test_a_column_that_a_row_lacks_is_said_with_the_map() -> None:
    with pytest.raises(DataError, match=r"found keys \['body'\], but format text needs `text` \(columns is"):
        read_record({"body": "x"}, "text", {"text": "bdy"})


def test_the_config_names_every_format_and_every_column_it_needs() -> None:
    names = set(get_args(RowSource.model_fields["format"].annotation)) - {"auto"}
    assert names == set(formats._READERS) == set(formats._NEEDED)
    assert {key for keys in formats._NEEDED.values() for key in keys} <= set(get_args(Column))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"instruction": "Add 100%.", "input": "", "output": "\n4"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n"
            "### Instruction:\nAdd 100%.\n\n### Response:\n",
        ),
        (
            {"instruction": "Add {x}.", "input": "2 2", "output": "\n4", "text": "rendered"},
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Input:\n2 2\n\n### Response:\n",
        ),
    ],
)
def test_a_row_of_alpaca_becomes_text_with_headings(row: dict[str, str], prompt: str) -> None:
    assert read_record(row, "alpaca", prompt="alpaca") == Completion(prompt, "\n4", is_apart=True)


@pytest.mark.parametrize(
    ("style", "asked", "prompt"),
    [
        ("alpaca_chat", "", "SYSTEM: {S}\nUSER: Add.\nASSISTANT:"),
        ("alpaca_chat", "2 2", "SYSTEM: {S}\nUSER: Add.\n2 2\nASSISTANT:"),
        ("alpaca_chatml", "2 2", "<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\nAdd.\n2 2<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("alpaca_chatml", "", "<|im_start|>system\n{S}<|im_end|>\n<|im_start|>user\nAdd.<|im_end|>\n"
         "<|im_start|>assistant\n"),
        ("alpaca_phi", "", "<|system|>\n{S}<|end|>\n<|user|>\nAdd.<|end|>\n<|assistant|>\n"),
        ("alpaca_phi", "2 2", "<|system|>\n{S}<|end|>\n<|user|>\nAdd.<|end|>2 2<|assistant|>"),
    ],
)  # fmt: skip
def test_the_other_styles_of_alpaca_are_those_of_axolotl(style: str, asked: str, prompt: str) -> None:
    """The texts are of `AlpacaPrompter` in Axolotl 0.18."""
    system = "Below is an instruction that describes a task"
    system += ", paired with an input that provides further context" if asked else ""
    system += ". Write a response that appropriately completes the request."
    row = {"instruction": "Add.", "input": asked, "output": "4"}
    assert read_record(row, "alpaca", prompt=style) == Completion(prompt.replace("{S}", system), "4", is_apart=True)


@pytest.mark.parametrize(
    "row",
    [{"text": "a"}, {"instruction": "a", "output": "b", "system": "c"}, {"instruction": 1, "output": "b"}],
)
def test_a_row_that_headings_would_not_hold_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        read_record(row, prompt="alpaca")


def test_a_prompt_of_ones_own_writes_a_row() -> None:
    own = PromptFormat(
        system="Be brief.", system_format="<{system}>\n", format="Q: {instruction} {{{input}}}",
        no_input_format="Q: {instruction}", answer_format="A: {output}",
    )  # fmt: skip
    row = {"instruction": "a {input}", "input": "b", "output": "c"}
    assert read_record(row, prompt=own) == Completion("<Be brief.>\nQ: a {input} {b}", "A: c", is_apart=True)
    assert read_record(row | {"input": "", "system": "Go."}, prompt=own).prompt == "<Go.>\nQ: a {input}"
    assert read_record(row | {"system": ""}, prompt=own).prompt == "Q: a {input} {b}"


@pytest.mark.parametrize("text", ["{output}", "{instruction!r}", "{instruction.__class__}", "{0}", "{", "{input:9}"])
def test_a_prompt_that_cannot_be_filled_is_an_error_of_the_config(text: str) -> None:
    with pytest.raises(ValidationError, match="instruction"):
        RowSource.model_validate({"source": "a.jsonl", "prompt": {"no_input_format": text}})


def test_headings_give_other_shards_than_turns() -> None:
    part = whole([SourceFile("a.jsonl", "jsonl", None, 1, "xxh3:0")])
    turns, headings = RowSource(source="a.jsonl"), RowSource(source="a.jsonl", prompt="alpaca")
    own = RowSource(source="a.jsonl", prompt=PromptFormat())
    keys = [json.dumps(reading_key(source, part)) for source in (turns, headings, own)]
    assert len(set(keys)) == 3
