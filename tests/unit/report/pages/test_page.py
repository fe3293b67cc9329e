"""Pages: whatever text goes in stays text, nothing runs, nothing is fetched."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.report.pages.page import (
    alert,
    bar_chart,
    contents,
    escape,
    heading,
    labelled,
    lines,
    page,
    paragraph,
    section,
    stacked,
    styled,
    table,
    tiles,
    verbatim,
)
from tests.helpers.pages import check_inert, texts_of

HOSTILE = [
    "<script>alert(1)</script>", '" onload="alert(1)', "' onerror='x", "</title><script>", "</style><img src=x>",
    "<!-- ", "]]>", "&lt;script&gt;", "javascript:alert(1)", "\x00\x1b[2J\u202e\u2028", "https://evil.example/x.js",
    "<svg/onload=alert(1)>", "{{7*7}}", "\ud800",
]  # fmt: skip


def everywhere(text: str) -> str:
    parts = [
        heading(text), paragraph(text), lines([text, text]), stacked(text, lines([text])), labelled(text),
        table([text, "n"], [[text, 1], [lines([text]), 2.5]]), bar_chart(text, [(text, 1.0), ("b", 2)], text),
        section("s", text), contents([("s", text)]), tiles([(text, text, text)]), alert(text), verbatim(text),
        styled(text, "note"),
    ]  # fmt: skip
    return page(text, parts)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(text: str) -> None:
    shown = everywhere(text)
    check_inert(shown)
    assert shown.count(escape(text)) >= 15


@given(st.text(max_size=50))
def test_any_text_stays_text(text: str) -> None:
    shown = everywhere(text)
    check_inert(shown)
    assert escape(text) in shown
    shown.encode("utf-8")


def test_a_long_text_is_cut() -> None:
    assert len(everywhere("x" * 10_000_000)) < 20_000


def test_the_policy_allows_styles_and_nothing_else() -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page("t", []))
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"
    }  # fmt: skip


def test_a_bar_is_as_high_as_its_value() -> None:
    heights = [
        float(height)
        for height in re.findall(r'height="([\d.]+)" fill', bar_chart("c", [("a", 1), ("b", 4)], "x").text)
    ]
    assert heights[0] == pytest.approx(heights[1] / 4, abs=0.1)


@pytest.mark.parametrize("bars", [[], [("a", 0.0)], [("a", 1e300)], [(str(n), n) for n in range(500)]])
def test_a_chart_of_anything_can_be_drawn(bars: list[tuple[str, float]]) -> None:
    text = page("t", [bar_chart("c", bars, "x")])
    check_inert(text)
    assert "nan" not in text and "inf" not in text
    assert text.count("<rect") == len(bars)


def test_numbers_stand_right_and_words_left() -> None:
    text = table(["name", "count"], [["a", 1234], ["b", 5]]).text
    assert '<td class="n">1,234</td>' in text and "<td>a</td>" in text
    assert '<th class="n">count</th>' in text


def test_a_page_is_read_back_as_what_was_put_in() -> None:
    parsed = texts_of(page("A & B", [paragraph("1 < 2"), lines(["x", "y"])]))
    assert [text for text in parsed if text.strip()][-4:] == ["A & B", "1 < 2", "x", "y"]
