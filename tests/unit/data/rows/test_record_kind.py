"""Rows of preference data are told from conversations by their keys, in the spellings of other tools."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.rows.formats import read_record
from dist_ft.data.rows.record_kind import preference_kind
from dist_ft.errors import DataError

TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
SAID = [{"from": "human", "value": "2+2?"}]
GOOD, BAD = {"from": "gpt", "value": "4"}, {"from": "gpt", "value": "5"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "preference"),
        ({"chosen": TALK, "rejected": TALK}, "preference"),
        ({"messages": TALK, "prompt": "2+2?", "chosen": TALK, "rejected": TALK, "score_chosen": 9.0}, "preference"),
        ({"conversations": SAID, "chosen": GOOD, "rejected": BAD}, "preference"),
        ({"instruction": "2+2?", "input": "", "output": "4", "chosen": "4", "rejected": "5"}, "preference"),
        ({"messages": TALK, "rejected_response": "5"}, "preference"),
        ({"messages": TALK, "rejected_messages": TALK}, "preference"),
        ({"input": {"messages": TALK}, "preferred_output": TALK, "non_preferred_output": TALK}, "preference"),
        ({"prompt": "2+2?", "completion": "4", "label": True}, "labelled"),
        ({"prompt": "2+2?", "completion": "4", "label": "False"}, "labelled"),
        ({"messages": TALK, "label": 0}, "labelled"),
        ({"conversations": [*SAID, GOOD], "kto_tag": True}, "labelled"),
        ({"instruction": "2+2?", "output": "4", "kto_tag": False}, "labelled"),
        ({"messages": TALK, "label": "maths", "chosen": None, "rejected": ""}, None),
        ({"messages": TALK, "label": 3}, None),
        ({"messages": TALK, "chosen": True}, None),
        ({"text": "a review", "label": 1}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_the_keys_of_a_row_tell_preferences(row: dict[str, Any], kind: str | None) -> None:
    assert preference_kind(row) == kind


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": TALK, "rejected_response": "5"}, r"a pair of answers \(`rejected_response`\)"),
        ({"messages": TALK, "label": False}, r"an answer with a label \(`label`\)"),
    ],
)
def test_preferences_are_not_read_as_conversations(row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_record(row, "messages")
