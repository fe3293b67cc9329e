"""Reading raw rows: what is accepted, and where a bad one stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_ft.errors import DataError
from dist_ft.stream.sources import Problem, content_hash, read_rows, scan_rows

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
GOOD_LINE = json.dumps(GOOD).encode()


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
        (b'{"prompt": "a", "completion": "b"}', "found keys ['completion', 'prompt']"),
        (b'{"messages": []}', "expected a list of turns"),
        (b'{"messages": null}', "expected a list of turns"),
        (b'{"messages": {"role": "user"}}', "expected a list of turns"),
        (turns("hello"), "turn 0"),
        (turns(turn(), turn("robot")), "turn 1"),
        (turns(turn(None)), "turn 0"),
        (turns(turn(["assistant"])), "turn 0"),
        (turns(turn("Assistant")), "turn 0"),
        (turns(turn("user"), {"role": "assistant"}), "turn 1"),
        (turns(turn(content=None)), "turn 0"),
        (turns(turn(content=[{"type": "text", "text": "x"}])), "turn 0"),
        (turns({"from": "gpt", "value": "x"}), "turn 0"),
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


@pytest.mark.parametrize("name", ["nowhere.jsonl", "."])
def test_a_file_that_cannot_be_opened_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("row_format", ["prompt_completion", "alpaca", "sharegpt", "text"])
def test_a_format_that_is_not_read_yet_is_refused(tmp_path: Path, row_format: str) -> None:
    with pytest.raises(DataError, match=f"format={row_format}"):
        list(read_rows(write(tmp_path / "a.jsonl", GOOD_LINE), row_format))


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


def test_a_scan_goes_on_after_each_bad_row(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", b"broken", GOOD_LINE, b"", turns(turn("user")), GOOD_LINE[:-1] + b"\xff}", GOOD_LINE, b"5"
    )
    found = list(scan_rows(source))
    assert [(row.place, isinstance(row, Problem)) for row in found] == [
        (f"{source}:{line}", is_bad)
        for line, is_bad in [(1, True), (2, False), (4, True), (5, True), (6, False), (7, True)]
    ]
    problems = [row for row in found if isinstance(row, Problem)]
    assert all(problem.message.startswith(f"{problem.place}: ") for problem in problems)
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    assert str(caught.value) == problems[0].message


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"messages": "\x1b[31m" + "x" * 10_000_000}).encode(),
        json.dumps({"messages": [{"role": "\u202e" + "x" * 10_000_000}]}).encode(),
        json.dumps({"\x00\x1b[2J" + "x" * 10_000_000: 1}).encode(),
        b"\x1b[31m" + b"x" * 10_000_000,
    ],
    ids=["messages", "a turn", "a key", "the line"],
)
def test_what_an_error_quotes_is_short_and_harmless(tmp_path: Path, line: bytes) -> None:
    with pytest.raises(DataError, match=":1: ") as caught:
        list(read_rows(write(tmp_path / "a.jsonl", line)))
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()
