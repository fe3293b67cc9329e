"""Charts: points stand where their axes say, colours are the page's, nothing in them acts."""

from __future__ import annotations

import math
import re

import pytest

from dist_ft.report.pages.figures import Band, Chart, Line, Mark, draw, smooth, thin
from dist_ft.report.pages.page import page
from tests.helpers.pages import check_inert, texts_of


def chart(*lines: Line, **how: object) -> Chart:
    return Chart("A chart", "step", "loss", lines, **how)  # type: ignore[arg-type]


def test_a_point_stands_where_the_ticks_say() -> None:
    drawn = draw(chart(Line("", [(0, 0.0), (50, 5.0), (100, 10.0)]), is_from_zero=True)).text
    ticks = dict(re.findall(r'translate|x="([\d.]+)" y="[\d.]+" transform="rotate\(-0 [\d. ]+\)">([\d.]+)<', drawn))
    at = {float(text): float(x) for x, text in ticks.items() if text}
    (path,) = [d for d, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', drawn) if "--c0" in style]
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
    assert xs == pytest.approx([at[0], (at[0] + at[100]) / 2, at[100]], abs=0.1)


def test_a_chart_is_inert_and_in_the_colours_of_the_page() -> None:
    lines = [Line(kind, [(1, 1.0), (2, 3.0)], kind, i) for i, kind in enumerate(("line", "points", "faint", "steps"))]
    figure = draw(chart(*lines, bands=[Band("attempt 1", 0, 1), Band("attempt 2", 1, 2)], marks=[Mark(1.5, True)]))
    whole = page("t", [figure, draw(Chart("Another", "x", "y", lines))])
    check_inert(whole)
    assert not re.search(r"(fill|stroke): #", figure.text)
    shown = texts_of(whole)
    for text in ("A chart", "step", "loss", "line", "points", "attempt 1", "attempt 2"):
        assert text in shown, text


@pytest.mark.parametrize("y", [math.nan, math.inf, -math.inf])
def test_points_that_are_no_numbers_are_left_out(y: float) -> None:
    assert draw(chart(Line("", [(1, y)]))).text == ""
    assert draw(chart(Line("", [(1, y), (2, 1.0)]))).text != ""
    assert draw(chart()).text == ""


@pytest.mark.parametrize("values", [[0.0], [1.0] * 3, [-1e300, 1e300], [1e-12, 2e-12], [5e4, 6e9]])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    for how in ({}, {"is_from_zero": True}, {"is_share": True}):
        check_inert(page("t", [draw(chart(Line("", [*enumerate(values)]), **how))]))


def test_thinning_keeps_the_mean_and_smoothing_the_level() -> None:
    points = [(float(x), float(x % 7)) for x in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:5], 100) == points[:5]
    level = smooth([(float(x), 3.0) for x in range(200)])
    assert [y for _, y in level] == pytest.approx([3.0] * 200)
    assert [x for x, _ in smooth(points)] == [x for x, _ in points]
