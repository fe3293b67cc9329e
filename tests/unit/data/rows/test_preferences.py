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
    "a csv file": {"instruction": "q", "output": "bad", "label": "False"},
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_a_pair_is_the_same_in_every_spelling(row: dict[str, Any]) -> None:
    assert read_record(row) == Preference([ASK], [GOOD], [BAD])


@pytest.mark.parametrize("row", LABELLED.values(), ids=LABELLED)
def test_a_labelled_answer_is_the_same_in_every_spelling(row: dict[str, Any]) -> None:
    assert read_record(row) == Labelled([ASK], [BAD], False)


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
    ],
)
def test_what_cannot_be_compared_is_a_bad_row(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_record(row)
