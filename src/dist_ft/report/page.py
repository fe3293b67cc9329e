"""Makes HTML pages of one file, with charts as SVG. A page has no script and fetches nothing.

Owns frame, escaping and charts. Any text may come from outside, so it is escaped, made printable and cut.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_ft.printable import printable

_MAX_TEXT = 400
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 200, 60, 24, 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667; --line: #d5d9de; --bar: #3b76c4; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #98a2ad; --line: #3a424b; --bar: #6ea3e8; --back: #15191d; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; }
code { font-size: .85em; } .soft { color: var(--soft); }
.error { color: #c22; font-weight: 600; } .warning { color: #a60; font-weight: 600; } .note { color: var(--soft); }
svg { width: 100%; max-width: 45rem; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
"""


@dataclass(frozen=True)
class Html:
    """Text that is already HTML. Only functions of this module make it; any other text is escaped."""

    text: str


Cell = str | int | float | Html


def escape(value: object, limit: int = _MAX_TEXT) -> str:
    """Return a value as HTML text that is also safe in an attribute."""
    return html.escape(printable(str(value), limit), quote=True)


def page(title: str, parts: Iterable[Html]) -> str:
    """Return a whole page."""
    body = "\n".join(part.text for part in parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def heading(text: str) -> Html:
    """Return the heading of a section."""
    return Html(f"<h2>{escape(text)}</h2>")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return Html(f"<p>{escape(text)}</p>")


def lines(texts: Iterable[str]) -> Html:
    """Return lines in a narrow font, such as locations."""
    return Html("<br>".join(f"<code>{escape(text)}</code>" for text in texts))


def stacked(*parts: Html | str) -> Html:
    """Return parts one below the other."""
    return Html("<br>".join(part.text if isinstance(part, Html) else escape(part) for part in parts))


def labelled(kind: str) -> Html:
    """Return a word in the colour of its kind: error, warning or note."""
    return Html(f'<span class="{escape(kind)}">{escape(kind)}</span>')


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Html:
    """Return a table; numbers are aligned to the right."""
    of_rows = list(rows)
    is_number = [all(isinstance(row[i], int | float) for row in of_rows) for i in range(len(heads))]
    classes = [' class="n"' if flag and of_rows else "" for flag in is_number]
    head = "".join(f"<th{kind}>{escape(text)}</th>" for text, kind in zip(heads, classes, strict=True))
    body = []
    for row in of_rows:
        cells = []
        for cell, kind in zip(row, classes, strict=True):
            shown = (
                _number(cell) if isinstance(cell, int | float) else escape(cell) if isinstance(cell, str) else cell.text
            )
            cells.append(f"<td{kind}>{shown}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    rows_text = "\n".join(body)
    return Html(f'<div class="scroll"><table>\n<tr>{head}</tr>\n{rows_text}\n</table></div>')


def bar_chart(label: str, bars: Sequence[tuple[str, float]], unit: str) -> Html:
    """Return bars side by side, with a name below and a tooltip each.

    Args:
        label: What the chart shows, for readers that do not see it.
        bars: Name and value of each, none negative.
        unit: Unit of the values.
    """
    if not bars:
        return Html("")
    top = max(1e-12, max(value for _, value in bars))
    step = (_WIDTH - _LEFT) / len(bars)
    every = -(-len(bars) // 10)  # show at most ten names, so that they do not overlap
    parts = [_axis(top)]
    for index, (name, value) in enumerate(bars):
        height = (_HEIGHT - _BOTTOM - _TOP) * value / top
        x, y = _LEFT + index * step, _HEIGHT - _BOTTOM - height
        parts.append(
            f'<rect x="{x + step * 0.08:.1f}" y="{y:.1f}" width="{step * 0.84:.1f}" height="{height:.1f}" '
            f'fill="var(--bar)"><title>{escape(name)}: {_number(value)} {escape(unit)}</title></rect>'
        )
        if index % every == 0:
            middle = x + step / 2
            parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(name, 24)}</text>')
    return _svg(label, parts)


def line_chart(
    label: str, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], is_from_zero: bool = False
) -> Html:
    """Return lines over a common axis, such as losses over steps; points that are not finite are left out.

    Args:
        label: What the chart shows.
        lines: Name and points of each line; the first line is emphasised.
        is_from_zero: Whether the axis of values begins at 0; otherwise it begins at the smallest value.
    """
    finite = [(name, [(x, y) for x, y in points if abs(y) < float("inf")]) for name, points in lines]
    points = [point for _, some in finite for point in some]
    if not points:
        return Html("")
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    low = min(0.0, low) if is_from_zero else low
    parts = [
        _axis(high, low),
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{_number(left)}</text>',
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end">{_number(right)}</text>',
    ]
    for index, (name, some) in enumerate(finite):
        path = " ".join(
            f"{_LEFT + (_WIDTH - _LEFT - 8) * (x - left) / max(1e-12, right - left):.1f},"
            f"{_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * (y - low) / max(1e-12, high - low):.1f}"
            for x, y in some
        )
        color = "var(--bar)" if index == 0 else "var(--soft)"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"><title>{escape(name)}</title>'
            "</polyline>"
        )
    names = ", ".join(f"{name} ({'blue' if index == 0 else 'grey'})" for index, (name, _) in enumerate(finite))
    return Html(_svg(label, parts).text + (paragraph(names).text if len(finite) > 1 else ""))


def _svg(label: str, parts: Iterable[str]) -> Html:
    inner = "\n".join(parts)
    return Html(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{inner}\n</svg>')


def _axis(high: float, low: float = 0.0) -> str:
    base = _HEIGHT - _BOTTOM
    return (
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{_number(high)}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">{_number(low)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
