"""What of a record is text, and by whom it is said."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.rows.texts import compared_text, record_key
from dist_ft.records import Completion, Conversation, Record

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "ü", "n": [1, "y"]}}}
CHAT = Conversation(
    [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "seven"},
    ]
)
ARGUMENTS = '{"x": "ü", "n": [1, "y"]}'


def test_all_that_is_said_is_text() -> None:
    assert list(CHAT.role_texts()) == [
        ("system", "be kind"), ("user", "hi"), ("assistant", "hm"), ("assistant", ARGUMENTS), ("tool", "7"),
        ("assistant", "seven"),
    ]  # fmt: skip
    assert list(Completion("", "a").role_texts()) == [("assistant", "a")]
    assert list(Completion("p", "a").role_texts()) == [("user", "p"), ("assistant", "a")]


def test_instructions_are_not_compared() -> None:
    assert compared_text(CHAT) == f"hi\nhm\n{ARGUMENTS}\n7\nseven"


def test_the_answer_is_what_is_said_last() -> None:
    assert [record.answer_text() for record in (CHAT, Completion("p", "a"), Completion("", "a"))] == ["seven", "a", ""]
    assert Conversation(CHAT.messages[:2]).answer_text() == ""


def test_every_text_is_mapped_and_nothing_else() -> None:
    mapped = CHAT.map_texts(str.upper)
    assert [text for _, text in mapped.role_texts()] == [
        "BE KIND", "HI", "HM", '{"x": "Ü", "n": [1, "Y"]}', "7", "SEVEN"
    ]  # fmt: skip
    assert isinstance(mapped, Conversation)
    assert mapped.messages[2]["tool_calls"][0]["function"]["name"] == "f"
    assert [message["role"] for message in mapped.messages] == [message["role"] for message in CHAT.messages]


def test_a_record_of_records_has_a_key() -> None:
    class Both(Completion):
        def __init__(self, *sides: Record) -> None:
            vars(self).update(prompt="", completion="", sides=list(sides))

    one, other = Completion("", "a"), Completion("", "b")
    assert record_key(Both(one, other)) == record_key(Both(one, Completion("", "b")))
    assert len({record_key(both) for both in (Both(one, other), Both(other, one), Both(one), one)}) == 4


RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.builds(Completion, st.text(), st.text()),
    st.builds(
        Conversation,
        st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})),
    ),
)


@given(RECORDS)
def test_mapping_to_the_same_gives_the_same(record: Record) -> None:
    assert record.map_texts(str) == record
    assert record_key(record.map_texts(str)) == record_key(record)
