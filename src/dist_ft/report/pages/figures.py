"""Draws charts with matplotlib as SVG that stands in a page. The only place that imports matplotlib.

One drawing serves light and dark: colours are drawn as marks, which become CSS variables of the page. An SVG has no
script, no metadata and refers to nothing outside of itself; texts stay texts, so they can be searched and printed.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from dist_ft.printable import printable
from dist_ft.report.pages.page import Html, escape

WIDE, HALF = (9.6, 3.4), (4.7, 2.5)
"""Size of a chart in inches: over the whole page, and two beside each other."""
_MARKS = {
    "ink": "#010101", "soft": "#020202", "line": "#030303", "c0": "#040404", "c1": "#050505", "c2": "#060606",
    "c3": "#070707", "c4": "#080808", "c5": "#090909", "bad": "#0a0a0a", "band": "#0b0b0b", "faint": "#0c0c0c",
}  # fmt: skip
"""CSS variable of `page.py` → the colour that stands for it in a drawing."""
_NUM_COLOURS = 6
_STEPS = [1, 2, 2.5, 5, 10]
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "DejaVu Sans", "font.size": 9,
    "axes.edgecolor": _MARKS["line"], "axes.labelcolor": _MARKS["soft"], "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": _MARKS["line"], "ytick.color": _MARKS["line"],
    "xtick.labelcolor": _MARKS["soft"], "ytick.labelcolor": _MARKS["soft"], "grid.color": _MARKS["line"],
    "grid.linewidth": 0.6, "grid.alpha": 0.7, "axes.grid": True, "axes.axisbelow": True, "legend.frameon": False,
    "legend.labelcolor": _MARKS["ink"], "legend.fontsize": 9, "axes.labelsize": 9, "text.color": _MARKS["ink"],
    "lines.linewidth": 1.6, "path.simplify": True,
}  # fmt: skip
_MAX_NAME = 48
_NAMED_BANDS = 12
"""Most bands that have their name written; more would overlap."""
_KEPT = re.compile(r"<svg .*</svg>", re.DOTALL)
_DROPPED = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style[^>]*>.*?</style>\s*</defs>", re.DOTALL)
_ID = re.compile(r'(id="|href="#|url\(#)')
_FONT = re.compile(r"'DejaVu Sans'")


@dataclass(frozen=True)
class Line:
    """A line, or points, of a chart.

    Attributes:
        name: Name in the legend; empty for none.
        points: x and y; points that are not finite are left out.
        kind: `line`, `points` (with a thin line), `faint` (a background of the next line), or `steps` (a staircase).
        colour: Number of its colour.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: str = "line"
    colour: int = 0


@dataclass(frozen=True)
class Band:
    """A part of the x axis that is shaded, such as an attempt."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x, drawn as a line from top to bottom."""

    x: float
    is_bad: bool


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: What it shows; also for readers that do not see it.
        x_label: Name and unit of the x axis.
        y_label: Name and unit of the y axis.
        lines: What is drawn.
        bands: Parts of the x axis, shaded in turns.
        marks: Events.
        is_from_zero: Whether the y axis begins at 0.
        is_share: Whether values are shares, shown in per cent.
        size: Width and height in inches.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    bands: Sequence[Band] = ()
    marks: Sequence[Mark] = ()
    is_from_zero: bool = False
    is_share: bool = False
    size: tuple[float, float] = field(default=HALF)


def draw(chart: Chart) -> Html:
    """Return a chart as a figure of a page; nothing where it has no point."""
    drawn = [(line, _finite(line.points)) for line in chart.lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return Html("")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=chart.size, layout="constrained")
        axes = figure.add_subplot()
        _shade(axes, chart)
        for line, points in drawn:
            _add(axes, line, points)
        _set_axes(axes, chart, [y for _, points in drawn for _, y in points])
        if any(line.name for line, _ in drawn):
            figure.legend(loc="outside upper left", ncols=4, handlelength=1.4, columnspacing=1.4)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # Texts are drawn by the browser, which has more glyphs than the font that measures them.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Html(_figure(chart.title, buffer.getvalue()))


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points; neighbours become their mean."""
    size = max(1, math.ceil(len(points) / most))
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the mean of each point and its neighbours on both sides, a twentieth of all points together."""
    reach = len(points) // 40
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    found = []
    for index, (x, _) in enumerate(points):
        start, end = max(0, index - reach), min(len(points), index + reach + 1)
        found.append((x, (sums[end] - sums[start]) / (end - start)))
    return found


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _add(axes: Axes, line: Line, points: Sequence[tuple[float, float]]) -> None:
    xs, ys = zip(*points, strict=True)
    colour, name = _MARKS[f"c{line.colour % _NUM_COLOURS}"], printable(line.name, _MAX_NAME) or None
    if line.kind == "points":
        axes.plot(xs, ys, color=colour, label=name, linewidth=0.9, marker="o", markersize=3.6)
    elif line.kind == "faint":
        axes.plot(xs, ys, color=_MARKS["faint"], label=name, linewidth=0.9)
    elif line.kind == "steps":
        axes.step(xs, ys, color=colour, label=name, where="post")
    elif len(points) == 1:
        axes.plot(xs, ys, color=colour, label=name, marker="o", markersize=3.6)
    else:
        axes.plot(xs, ys, color=colour, label=name)


def _shade(axes: Axes, chart: Chart) -> None:
    for number, band in enumerate(chart.bands):
        if number % 2:
            axes.axvspan(band.start, band.end, color=_MARKS["band"], linewidth=0, zorder=0)
        if len(chart.bands) <= _NAMED_BANDS:
            middle = (band.start + band.end) / 2
            name = printable(band.name, _MAX_NAME)
            axes.text(middle, 1.0, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                      fontsize=8, color=_MARKS["soft"])  # fmt: skip
    for mark in chart.marks:
        axes.axvline(mark.x, color=_MARKS["bad" if mark.is_bad else "c2"], linewidth=1.0, linestyle=(0, (3, 2)))


def _set_axes(axes: Axes, chart: Chart, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    if chart.is_from_zero:
        low = min(0.0, low)
    room = (high - low or abs(high) or 1.0) * 0.06
    axes.set_ylim(low - (0 if chart.is_from_zero and low == 0 else room), high + room)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(printable(chart.y_label, _MAX_NAME))
    axes.margins(x=0.01)
    if all(float(x).is_integer() for line in chart.lines for x, _ in line.points[:20]):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS, integer=chart.y_label == "workers"))
    largest = max(abs(low), abs(high))
    if chart.is_share and largest <= 10:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{1 if largest < 0.05 else 0}%}"))
    elif 1e4 <= largest < 1e15:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif not 1e-2 <= largest < 1e15:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.tick_params(length=3)


def _figure(title: str, drawn: str) -> str:
    """Return the SVG as an element of a page: only what shows something, ids that no other chart has, CSS colours."""
    found = _KEPT.search(_DROPPED.sub("", drawn))
    assert found is not None
    text = found[0]
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower())
    text = _ID.sub(lambda match: f"{match[1]}{prefix}-", text)
    text = _FONT.sub("system-ui, sans-serif", text).replace("xlink:href", "href")
    text = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", text)
    for name, mark in _MARKS.items():
        text = text.replace(mark, f"var(--{name})")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure><figcaption>{escape(title)}</figcaption>{text}</figure>"
