"""Every key of a row is read, harmless, refused or named: what other tools write is never lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_ft.data.rows.formats import read_record, unread_keys
from dist_ft.errors import DataError
from dist_ft.records import Completion, Conversation

ASKED = {"role": "user", "content": "What is 2+2?"}
GOOD = {"role": "assistant", "content": "Right: four."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def row_of(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, *turns], **more}


def weights(row: dict[str, Any]) -> list[int | None]:
    record = read_record(row)
    assert isinstance(record, Conversation)
    return [message.get("weight") for message in record.messages if message["role"] == "assistant"]


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        *(({key: False}, 0) for key in ("weight", "loss", "train", "training", "trainable", "loss_mask")),
        *(({key: True}, 1) for key in ("weight", "loss", "train", "training", "trainable", "loss_weight")),
        ({"loss": 0}, 0), ({"loss": 1.0}, 1), ({"masked": True}, 0), ({"masked": False}, 1), ({"loss": None}, None),
        ({"weight": 0, "loss": False}, 0),
        ({"content": [{"type": "text", "text": "WRONG", "train": False}]}, 0),
        ({"content": [{"type": "text", "text": "a", "weight": 1}, {"type": "text", "text": "b", "weight": 1}]}, 1),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": False}]}, 0),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": True},
                           {"begin_offset": 6, "end_offset": 10, "train": True}]}, 1),
        ({"training_detail": []}, None),
    ],
)  # fmt: skip
def test_flags_of_other_tools_are_read_as_weight(flags: dict[str, Any], weight: int | None) -> None:
    turn = {"role": "assistant", "content": "WRONG five.", **flags}
    assert weights(row_of(turn, ASKED, GOOD)) == [weight, None]


def test_a_call_in_a_turn_of_its_own_keeps_its_flag() -> None:
    called = {"from": "function_call", "value": json.dumps(CALL["function"]), "weight": 0, "name": "Ann"}
    record = read_record({"conversations": [{"from": "human", "value": "?"}, called, {"from": "tool", "value": "5"}]})
    assert isinstance(record, Conversation)
    assert record.messages[1] == {
        "role": "assistant", "content": "", "tool_calls": [CALL], "weight": 0, "name": "Ann"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (row_of({**GOOD, "loss": "false"}), "turn 1: `loss` is 'false', expected 0 or 1, or true or false"),
        (row_of({**GOOD, "train": 2}), "`train` is 2"),
        (row_of({**GOOD, "weight": 1, "loss": False}), "`weight` and `loss` contradict one another"),
        (row_of({**ASKED, "loss": True}, GOOD), "`loss` is 1 in a turn of role user; only assistant turns"),
        (row_of({"role": "assistant", "content": [{"type": "text", "text": "a", "train": False},
                                                  {"type": "text", "text": "b"}]}), "mark only a part of the turn"),
        (row_of({**GOOD, "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}), "only a part"),
        (row_of({**GOOD, "train_detail": [{"from": 1}]}), "begin_offset, end_offset and train"),
        (row_of({**GOOD, "loss_on_this": False}), "`loss_on_this` of a turn is False: what is trained is said by"),
        (row_of({**GOOD, "doTrain": False}), "`doTrain` of a turn"),
        (row_of({**GOOD, "mask": 1}), "`mask` of a turn is 1"),
        (row_of(GOOD, loss=False), "`loss` of a row is False"),
        (row_of(GOOD, weight=0.5), "`weight` of a row is 0.5"),
        (row_of(GOOD, mask="Assistant"), "`mask` of a row"),
        (row_of(GOOD, images=["cat.png"]), "`images` of a row is ['cat.png']: only text can be trained"),
        (row_of(GOOD, image="cat.png"), "only text can be trained"),
        (row_of(GOOD, videos=[{"path": "a.mp4"}]), "only text can be trained"),
        (row_of(GOOD, audio={"bytes": "x"}), "only text can be trained"),
        (row_of(GOOD, image_url="https://x/y.png"), "only text can be trained"),
        (row_of(GOOD, audioPaths=["a.wav"]), "only text can be trained"),
        (row_of(GOOD, objects={"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}), "only text can be trained"),
        (row_of({**ASKED, "images": ["cat.png"]}, GOOD), "`images` of a turn"),
        ({"instruction": "<image>?", "output": "A cat.", "images": ["cat.png"]}, "only text can be trained"),
        ({"prompt": "<image>?", "completion": "A cat.", "images": ["cat.png"]}, "only text can be trained"),
        ({"text": "<image>", "image": "cat.png"}, "only text can be trained"),
        (row_of(GOOD, chat_template_kwargs={"enable_thinking": False}), "settings of a chat template"),
        (row_of(GOOD, documents=[{"text": "x"}]), "settings of a chat template"),
        ({"messages": [{"role": "system", "content": "s", "tools": [TOOL]}, ASKED, GOOD]}, "belong to the row"),
        (row_of({**GOOD, "refusal": "I will not."}), "a refusal is said in the content"),
        (row_of({**GOOD, "channel": "analysis"}), "`channel` of a turn"),
        (row_of({**ASKED, "reasoning_content": "hm"}, GOOD), "only an assistant reasons"),
        (row_of({**GOOD, "reasoning": "a", "thinking": "b"}), "`reasoning` and `thinking` differ"),
        (row_of({**GOOD, "reasoning_details": [{"text": "a"}]}), "`reasoning_details` is not read"),
        (row_of(GOOD, system_prompt="Be kind."), "columns to {system: system_prompt}"),
        (row_of(GOOD, history=[["a", "b"]]), "`history` is only read beside"),
        (row_of(GOOD, input_ids=[1], labels=[1]), "already tokens"),
        ({"input_ids": [1], "attention_mask": [1], "labels": [1]}, "already tokens"),
        ({"prompt": "a", "completion": "b", "system": "Be kind."}, "`system` stands beside raw text"),
        ({"text": "a", "tools": [TOOL]}, "`tools` stands beside raw text"),
        *((row_of({**GOOD, key: "hm"}), "thoughts are read from `reasoning_content`")
          for key in ("thought", "thoughts", "thinking_content", "reasoning_text", "thinking_blocks", "tool_plan")),
        *((row_of({**GOOD, key: [{"name": "f", "arguments": {}}]}), "a call is written as `tool_calls`")
          for key in ("tool_call", "calls", "function_calls", "tool_uses")),
        (row_of({**GOOD, "parts": [{"text": "more"}]}), "what is said is read from `content`"),
        (row_of({"role": "assistant", "content": [{"type": "text", "text": "hm", "thought": True}]}), "thoughts are"),
        *((row_of({**GOOD, key: False}), "what is trained is said by `weight`")
          for key in ("learnable", "requires_grad", "is_target")),
        *((row_of({**GOOD, key: True}), "what is trained is said by `weight`") for key in ("ignore", "skip")),
        *((row_of({**GOOD, key: False}), "the end of an answer is always trained") for key in ("eot", "end_turn")),
        *((row_of(GOOD, **{key: ["a"]}), "only text can be trained")
          for key in ("img", "jpg", "wav", "mm_data", "multi_modal_data", "media_path", "rejected_images")),
        *((row_of(GOOD, **{key: [TOOL]}), "functions are read from `tools`")
          for key in ("available_tools", "tool_definitions")),
        (row_of({**GOOD, "tool_calls": [{**CALL, "name": "g"}]}), "a call has two names, 'g' and 'weather'"),
        (row_of({**GOOD, "tool_calls": [{"name": " ", "arguments": {}}]}), "the name of the function is empty"),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "stands beside raw text"),
    ],
)  # fmt: skip
def test_a_meaning_that_cannot_be_honoured_is_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        read_record(row)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"images": [], "videos": None, "audio": ""}, {"images": [None]}, {"images": "[]", "weight": "1"},
        {"chat_template_kwargs": {"a": None}},
        {"weight": 1, "train": True, "mask": "User", "masked": False}, {"parallel_tool_calls": False},
        {"id": 7, "source": "web", "score": 0.5, "model": "x", "metadata": {"images": ["x"]}, "prompt": "?"},
    ],
)  # fmt: skip
def test_what_says_nothing_is_read_past(more: dict[str, Any]) -> None:
    turn = {
        **GOOD,
        "refusal": None,
        "audio": None,
        "annotations": [],
        "channel": "final",
        "id": "m1",
        "images": [],
        "eot": True,
        "ipython": False,
    }
    assert read_record(row_of(turn, **more)) == Conversation([ASKED, GOOD])
    assert unread_keys(row_of(turn, **more), {}, []) == frozenset()


def test_a_system_prompt_may_be_repeated() -> None:
    told = {"role": "system", "content": "Be kind."}
    row = {"messages": [told, ASKED, GOOD], "system_prompt": "Be kind.\n"}
    assert read_record(row) == Conversation([told, ASKED, GOOD])
    assert read_record({"messages": [ASKED, GOOD], "system_prompt": "x"}, columns={"system": "system_prompt"})
    with pytest.raises(DataError, match=r"`system_prompt` is 'Be cruel\.', which no system turn says"):
        read_record({**row, "system_prompt": "Be cruel."})


@pytest.mark.parametrize("key", ["system", "tools"])
def test_every_conversation_has_the_rows_system_prompt_and_functions(key: str) -> None:
    more = {"system": "Be kind."} if key == "system" else {"functions": [TOOL["function"]]}
    for row in (
        {"messages": [ASKED, GOOD]}, {"conversations": [ASKED, GOOD]}, {"prompt": [ASKED], "completion": [GOOD]},
        {"instruction": ASKED["content"], "output": GOOD["content"]},
    ):  # fmt: skip
        record = read_record({**row, **more})
        assert isinstance(record, Conversation)
        assert record.tools == ((TOOL,) if key == "tools" else ())
        assert record.messages[0] == ({"role": "system", "content": "Be kind."} if key == "system" else ASKED)


def test_keys_that_nothing_gives_a_meaning_to_are_named() -> None:
    turn = {
        "role": "assistant", "content": [{"type": "text", "text": "a", "style": 1}], "mood": "glad",
        "tool_calls": [{"id": "1", "type": "function", "retries": 2, "function": {**CALL["function"], "result": "5"}}],
    }  # fmt: skip
    row = row_of(json.dumps(turn), reward=1.5, nothing=None)
    assert unread_keys(row, {}, []) == {
        "reward of a row", "mood of a turn", "style of a part of a content", "retries of a call",
        "result of a called function",
    }  # fmt: skip
    assert unread_keys(row, {}, ["reward", "mood", "style", "retries", "result"]) == frozenset()
    assert unread_keys({"dialog": [ASKED, GOOD], "reward": 1}, {"messages": "dialog"}, []) == {"reward of a row"}


@pytest.mark.parametrize(
    ("row", "lost"),
    [
        ({"text": "a review", "label": 1}, {"label"}),
        (row_of(GOOD, label="maths", chosen=True, response="x"), {"label", "chosen", "response"}),
        ({"prompt": "a", "completion": "b", "input": "c"}, {"input"}),
        (row_of(GOOD, prompt="a", completion="b", input="c"), set()),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "question": "a"}, set()),
        ({"prompt": "a", "completion": "b", "label": True}, set()),
        ({"instruction": "a", "input": "b", "output": "c", "prompt": "a b", "text": "a b c"}, set()),
    ],
)  # fmt: skip
def test_keys_of_another_format_are_not_lost_without_a_word(row: dict[str, Any], lost: set[str]) -> None:
    assert unread_keys(row, {}, []) == {f"{key} of a row" for key in lost}


def test_ignored_keys_are_not_looked_at() -> None:
    row = {
        "messages": [{**ASKED, "images": ["a"]}, {**GOOD, "channel": "analysis"}], "images": ["a"],
        "rejected_response": "no", "label": True,
    }  # fmt: skip
    ignored = ["images", "channel", "rejected_response", "label"]
    assert read_record(row, ignored=ignored) == Conversation([ASKED, GOOD])
    assert read_record({"text": "a", "label": 1}, ignored=ignored) == Completion("", "a")
