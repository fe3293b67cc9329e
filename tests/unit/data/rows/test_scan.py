"""Reading raw rows: what is accepted, and where a bad one stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.data_sections import DataConfig, RowSource, SourceConfig
from dist_ft.data.rows import scan
from dist_ft.data.rows.scan import BadRow, Row, held_out_rows, scan_rows
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import whole
from dist_ft.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
GOOD_LINE = json.dumps(GOOD).encode()


def read_rows(source: str, **settings: Any) -> Iterator[Row]:
    return scan.read_rows(RowSource(source=source, **settings))


def content_hash(source: str) -> str:
    return whole(list_files(RowSource(source=source))).identity()


def write(path: Path, *lines: bytes, end: bytes = b"\n") -> str:
    path.write_bytes(b"".join(line + end for line in lines))
    return str(path)


def turns(*turns: Any) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


def turn(role: Any = "assistant", content: Any = "hello") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_rows_come_in_file_order_with_their_place(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", turns(turn(content="1")), turns(turn(content="2")))
    rows = list(read_rows(source))
    assert [(row.place, row.record.messages[0]["content"]) for row in rows] == [
        (f"{source}:1", "1"),
        (f"{source}:2", "2"),
    ]


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b"", GOOD_LINE, b"  \t", b"\r", GOOD_LINE, b"")
    assert [row.place for row in read_rows(source)] == [f"{source}:2", f"{source}:5"]


@pytest.mark.parametrize(
    "text",
    [GOOD_LINE, GOOD_LINE + b"\r\n", b"\xef\xbb\xbf" + GOOD_LINE + b"\n", b"\n\n" + GOOD_LINE],
    ids=["no newline at the end", "CRLF", "byte order mark", "blank lines first"],
)
def test_editors_may_differ(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(text)
    assert [row.record.messages for row in read_rows(str(tmp_path / "a.jsonl"))] == [GOOD["messages"]]


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    content = " ü\u2028😀\x00\n trailing "
    row = json.dumps({"messages": [turn(content=content)]}, ensure_ascii=False).encode()
    assert next(read_rows(write(tmp_path / "a.jsonl", row))).record.messages[0]["content"] == content


def test_all_roles_and_further_keys_are_allowed(tmp_path: Path) -> None:
    row = json.dumps(
        {"messages": [turn("system"), turn("user"), turn(), {**turn("tool"), "name": "x"}, turn()], "id": 5}
    )
    assert len(next(read_rows(write(tmp_path / "a.jsonl", row.encode()))).record.messages) == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"messages": [', "not valid JSON"),
        (b"hello", "not valid JSON"),
        (GOOD_LINE + GOOD_LINE, "not valid JSON"),
        (GOOD_LINE[:-1] + b"\xff}", "not valid UTF-8"),
        (b'{"messages": "\xe4"}', "not valid UTF-8"),
        (b"5", "found int"),
        (b"null", "found NoneType"),
        (b"[]", "found list"),
        (b'{"prompt": "a", "answer": "b"}', "found keys ['answer', 'prompt']"),
        (b'{"messages": []}', "expected a list of turns"),
        (b'{"messages": null}', "found keys ['messages']"),
        (b'{"messages": [], "messages": []}', "key 'messages' stands twice"),
        (b'{"messages": {"role": "user"}}', "expected a list of turns"),
        (turns("hello"), "turn 0"),
        (turns(turn(), turn("robot")), "turn 1"),
        (turns(turn(None)), "turn 0"),
        (turns(turn(["assistant"])), "turn 0"),
        (turns(turn("user"), {"role": "assistant"}), "turn 1"),
        (turns(turn(content=None)), "turn 0"),
        (turns(turn(content=[{"type": "image_url", "image_url": "x"}])), "turn 0"),
        (turns({"from": "gpt", "role": "user", "value": "x"}), "turn 0"),
        (turns(turn("system"), turn("user")), "no assistant turn"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    source = write(tmp_path / "a.jsonl", GOOD_LINE, b"", line, GOOD_LINE)
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    assert str(caught.value).startswith(f"{source}:3: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b'{"messages": ' + b"[" * 100_000, id="very deep"),
        pytest.param(b'{"id": ' + b"9" * 5000 + b', "messages": []}', id="number of 5000 digits"),
        pytest.param(turns(turn(content="\ud83d")), id="half a character"),
    ],
)
def test_a_row_that_nobody_can_tokenise_is_refused_with_file_and_line(tmp_path: Path, line: bytes) -> None:
    source = write(tmp_path / "a.jsonl", GOOD_LINE, line)
    with pytest.raises(DataError, match=":2: "):
        list(read_rows(source))


def test_rows_before_a_bad_one_are_given(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", GOOD_LINE, b"broken"))
    assert next(rows).record.messages == GOOD["messages"]


@pytest.mark.parametrize("text", [b"", b"\n\n", b"  \n\t\n"])
def test_a_source_without_rows_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.jsonl holds no rows"):
        list(read_rows(str(tmp_path / "a.jsonl")))


def test_a_file_that_cannot_be_opened_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        list(read_rows(str(tmp_path / "nowhere.jsonl")))


def test_an_embedded_source_is_read_by_name() -> None:
    row = next(read_rows("embedded:orders/train"))
    assert row.place == "embedded:orders/train:1"
    assert row.record.messages[-1]["role"] == "assistant"


def test_an_unknown_embedded_source_is_refused() -> None:
    with pytest.raises(DataError, match="embedded:nothing"):
        list(read_rows("embedded:nothing"))


def test_the_key_of_a_row_is_its_conversation(tmp_path: Path) -> None:
    again = json.dumps(
        {"id": 7, "messages": [dict(reversed(t.items())) for t in GOOD["messages"]]}, indent=None
    ).encode()
    other = turns(turn("user", "hi"), turn(content="hello!"))
    first, second, third = read_rows(write(tmp_path / "a.jsonl", GOOD_LINE, again, other))
    assert first.key == second.key != third.key
    assert 0 <= first.key < 2**64


def test_the_content_hash_is_of_bytes_not_of_the_path(tmp_path: Path) -> None:
    one = content_hash(write(tmp_path / "a.jsonl", GOOD_LINE))
    assert content_hash(write(tmp_path / "b.jsonl", GOOD_LINE)) == one
    assert content_hash(write(tmp_path / "a.jsonl", GOOD_LINE, end=b"\r\n")) != one
    assert content_hash("embedded:orders/train") != content_hash("embedded:orders/eval")


def test_after_a_bad_row_the_next_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD_LINE, b"broken", b"5", b'{"messages": ' + b"[" * 100_000, GOOD_LINE)
    found = list(scan_rows(RowSource(source=source)))
    assert [isinstance(row, BadRow) for row in found] == [False, True, True, True, False]
    assert [row.place for row in found] == [f"{source}:{n}" for n in range(1, 6)]
    assert found[1].raw == "broken"


def test_a_row_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x00\u202e" + "x" * 1000
    rows = [
        turns(turn("user"), turn(hostile * 10_000)),
        json.dumps({hostile: 1}).encode(),
        turns({**turn(), "name": [hostile]}),
        json.dumps(hostile).encode(),
        turns({**turn(), "tool_calls": [{"name": "f", "arguments": hostile}]}),
    ]
    source = write(tmp_path / "\x1b[31m.jsonl", *rows)
    for row in scan_rows(RowSource(source=source)):
        assert isinstance(row, BadRow)
        message = str(row.error())
        assert message.isprintable()
        assert len(message) < len(source) + 500


def test_a_group_shares_its_key_whatever_its_rows_say(tmp_path: Path) -> None:
    rows = [{"messages": [turn("user", str(n)), turn()], "user": n % 3} for n in range(9)]
    source = write(tmp_path / "a.jsonl", *(json.dumps(row).encode() for row in rows))
    keys = [row.key for row in scan.read_rows(RowSource(source=source), "user")]
    assert keys == keys[:3] * 3
    assert len(set(keys)) == 3


def test_a_row_without_its_group_is_bad(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps({**GOOD, "user": 1}).encode(), GOOD_LINE)
    with pytest.raises(DataError, match=r"a\.jsonl:2: has no `user`, which data\.group_by names"):
        list(scan.read_rows(RowSource(source=source), "user"))


def test_held_out_rows_come_from_every_training_source(tmp_path: Path) -> None:
    names = [
        write(tmp_path / f"{name}.jsonl", *(turns(turn("user", f"{name}{n}"), turn()) for n in range(100)))
        for name in "ab"
    ]
    data = DataConfig(train=[SourceConfig(source=name) for name in names], eval=0.2)
    held = [row.record.messages[0]["content"] for row in held_out_rows(data)]
    assert {text[0] for text in held} == {"a", "b"}
    assert 20 <= len(held) <= 60


def test_rows_of_a_held_out_source_are_all_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps({"dialog": GOOD["messages"]}).encode())
    data = DataConfig(
        train=[SourceConfig(source="nowhere")], eval=RowSource(source=source, columns={"messages": "dialog"})
    )
    assert [row.record.messages for row in held_out_rows(data)] == [GOOD["messages"]]


def test_bad_rows_are_no_held_out_rows(tmp_path: Path) -> None:
    data = {"train": [SourceConfig(source="nowhere")], "eval": write(tmp_path / "a.jsonl", GOOD_LINE, b"broken")}
    assert len(list(held_out_rows(DataConfig(**data, bad_rows="skip")))) == 1
    with pytest.raises(DataError, match=":2: not valid JSON"):
        list(held_out_rows(DataConfig(**data)))


def test_the_content_hash_of_a_folder_is_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", GOOD_LINE)
    one = content_hash(str(tmp_path / "d"))
    write(tmp_path / "d" / "b.jsonl", GOOD_LINE)
    two = content_hash(str(tmp_path / "d"))
    (tmp_path / "d" / "b.jsonl").rename(tmp_path / "d" / "c.jsonl")
    assert content_hash(str(tmp_path / "d")) == two != one
