"""Text of an answer, from tokens that are pieces of characters and of stop texts."""

from __future__ import annotations

import pytest

from dist_ft.engine.transcript import Transcript, num_held


def decode(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "told"),
    [
        ("naïve 日本 🙂", (), "naïve 日本 🙂"),
        ("abc END def", ("END",), "abc "),
        ("abc EN", ("END",), "abc EN"),
        ("aab", ("ab",), "a"),
        ("one\n\ntwo", ("\n\n", "one\n\nt"), "one"),
        ("日本語", ("本",), "日"),
    ],
)
def test_pieces_make_the_text_before_the_stop(text: str, stops: tuple[str, ...], told: str) -> None:
    transcript, pieces = Transcript(decode, stops), []
    for byte in text.encode():
        pieces.append(transcript.push(byte))
        if transcript.is_stopped:
            break
    pieces.append(transcript.finish())
    assert "".join(pieces) == told
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_told_as_such() -> None:
    transcript = Transcript(decode)
    assert transcript.push("é".encode()[0]) == ""
    assert transcript.finish() == "\ufffd"


def test_only_what_may_become_a_stop_is_held() -> None:
    assert num_held("abc E", ("END",)) == 1
    assert num_held("abc EN", ("END", "CEN")) == 2
    assert num_held("abc", ("END",)) == 0
