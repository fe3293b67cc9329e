"""Text of others on a terminal: seen, harmless and bounded."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("plain, with ünï¢ödé, 漢字 and 🙂", "plain, with ünï¢ödé, 漢字 and 🙂"),
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\x00b\x7fc\x9bd", "a\\x00b\\x7fc\\x9bd"),
        ("one\ntwo\r\tthree", "one\\ntwo\\r\\tthree"),
        ("abc\u202edcba\u2066", "abc\\u202edcba\\u2066"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028separator", "line\\u2028separator"),
        ("half \ud83d character", "half \\ud83d character"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("no-break\u00a0and wide\u3000spaces", "no-break\u00a0and wide\u3000spaces"),
        ("</script><b>", "</script><b>"),
        (r"a backslash \n stays", r"a backslash \n stays"),
    ],
)
def test_what_steers_a_terminal_is_an_escape_and_the_rest_stays(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_nothing_but_spaces_and_printable_characters_comes_out(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or unicodedata.category(c) == "Zs" for c in shown)
    assert printable(shown) == shown


@given(st.text(alphabet=st.characters(categories=["L", "N", "P"])))
def test_ordinary_text_stays(text: str) -> None:
    assert printable(text) == text


def test_long_text_is_cut_and_says_how_much_is_missing() -> None:
    assert printable("x" * 10_000_000, 5) == "xxxxx… (9,999,995 more characters)"
    assert printable("x" * 5, 5) == "xxxxx"
    assert len(printable("\x00" * 10_000_000, 100)) < 500
