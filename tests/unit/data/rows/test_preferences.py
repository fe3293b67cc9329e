"""Pairs of answers and answers with a label, in the spellings of five tools."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.rows.formats import read_record
from dist_ft.errors import DataError
from dist_ft.records import Labelled, Preference

ASK = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "s"}
SAID_GOOD, SAID_BAD = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}

PAIRS: dict[str, dict[str, Any]] = {
    "trl turns": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "trl implicit": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "trl, the answers repeat the prompt": {"prompt": "q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "ultrafeedback, the better conversation once more": {
        "prompt": "q", "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 8.0,
    },
    "openai": {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    "openai, older": {"input": {"messages": [ASK]}, "preferred_completion": [GOOD], "non_preferred_completion": [BAD]},
    "llama-factory alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "q"}], "chosen": SAID_GOOD, "rejected": SAID_BAD,
    },
    "ms-swift response": {"messages": [ASK, GOOD], "rejected_response": "bad"},
    "ms-swift messages": {"messages": [ASK, GOOD], "rejected_messages": [ASK, BAD]},
    "axolotl argilla": {"instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
    "axolotl intel": {"question": "q", "chosen": "good", "rejected": "bad"},
    "axolotl icr": {"input": "q", "chosen": "good", "rejected": "bad"},
    "axolotl chat_template": {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
}  # fmt: skip
LABELLED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": [ASK], "completion": [BAD], "label": False},
    "ms-swift": {"messages": [ASK, BAD], "label": False},
    "llama-factory": {"instruction": "q", "output": "bad", "kto_tag": False},
    "llama-factory sharegpt": {"conversations": [{"from": "human", "value": "q"}, SAID_BAD], "kto_tag": False},
    "axolotl argilla_chat": {"completion": [ASK, BAD], "label": False},
    "a csv file": {"instruction": "q", "output": "bad", "label": "False"},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_the_same_in_every_spelling(row: dict[str, Any]) -> None:
    assert read_record(row) == Preference([ASK], [GOOD], [BAD])


@pytest.mark.parametrize("row", LABELLED.values(), ids=LABELLED)
def test_a_labelled_answer_is_the_same_in_every_spelling(row: dict[str, Any]) -> None:
    assert read_record(row) == Labelled([ASK], [BAD], False)


def test_a_system_prompt_stands_before_the_better_conversation_once_more() -> None:
    row = {"system": "s", "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    assert read_record(row) == Preference([SYSTEM, ASK], [GOOD], [BAD])
    turns = [ASK, GOOD, ASK]
    row = {"messages": [*turns, GOOD], "chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert read_record(row) == Preference(turns, [GOOD], [BAD])


def test_texts_stay_texts() -> None:
    assert read_record({"prompt": "p", "chosen": " a", "rejected": " b"}) == Preference("p", " a", " b")
    assert read_record({"chosen": "it is blue", "rejected": "it is red"}) == Preference("it is", " blue", " red")
    assert read_record({"prompt": "p", "completion": " a", "label": True}) == Labelled("p", " a", True)


def test_system_and_tools_belong_to_the_prompt() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad", "tools": [tool]}
    assert read_record(row) == Preference([SYSTEM, ASK], [GOOD], [BAD], (tool,))
    openai = {"input": {"messages": [ASK], "tools": [tool]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    assert read_record(openai) == Preference([ASK], [GOOD], [BAD], (tool,))


def test_columns_name_the_keys_of_a_file() -> None:
    columns = {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    row = {"asked": [ASK], "better": [GOOD], "worse": [BAD]}
    assert read_record(row, "auto", columns) == Preference([ASK], [GOOD], [BAD])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are equal"),
        ({"prompt": [ASK], "chosen": [GOOD], "rejected": [GOOD]}, "are equal"),
        ({"prompt": "p", "chosen": "a", "rejected": "  "}, "`rejected` holds no answer"),
        ({"prompt": "p", "rejected": "a"}, "there is no chosen answer"),
        ({"messages": [ASK], "rejected_response": "a"}, "`messages` does not end with an answer"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [BAD]}, "`chosen` has no assistant turn"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "`chosen` is 3, expected text or turns"),
        ({"prompt": "p", "completion": "", "label": True}, "`completion` holds no answer"),
        ({"messages": [ASK, GOOD], "chosen": "good", "rejected": "bad"}, "the prompt ends with an answer"),
        ({"prompt": [ASK, GOOD], "completion": [BAD], "label": False}, "the prompt ends with an answer"),
        ({"prompt": [ASK], "chosen": [GOOD, ASK], "rejected": [BAD]}, "`chosen` does not end with an answer"),
        ({"chosen": [ASK, GOOD], "rejected": [{**ASK, "content": "r"}, BAD]}, "answers to different questions"),
        ({"prompt": "p", "chosen": "a", "chosen_response": "c", "rejected": "b"}, "mean the same and differ"),
        ({"messages": [ASK, GOOD], "rejected_response": "b", "rejected": "c"}, "mean the same and differ"),
        ({"question": "p", "input": "q", "chosen": "a", "rejected": "b"}, "`question` and `input` mean the same"),
        ({"prompt": "p", "completion": "a", "response": "b", "label": True}, "mean the same and differ"),
        ({"messages": [ASK, GOOD], "rejected_response": "b", "rejected_images": ["x.png"]}, "only text"),
        (
            {"input": {"messages": [ASK], "images": ["x"]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "only text can be trained",
        ),
    ],
)
def test_what_cannot_be_compared_is_a_bad_row(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_record(row)
