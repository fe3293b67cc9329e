"""Makes HTML pages of one file. A page has no script and fetches nothing.

Owns frame, escaping, tables and bars; `figures.py` draws charts.
Any text may come from outside, so it is escaped, made printable and cut.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_ft.printable import printable

_MAX_TEXT = 400
_MAX_ALERT = 2000
_MAX_VERBATIM, _MAX_LINES = 60_000, 1000
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 200, 60, 24, 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5f6b76; --line: #d9dde2; --bar: #3b76c4; --back: #fff;
  --card: #f6f7f9; --band: #eef2f7; --faint: #b9c9de; --bad: #c62a2f; --c0: #2f6fc0; --c1: #d9730d; --c2: #3f9142;
  --c3: #8b5cc4; --c4: #0f8a8a; --c5: #b3478f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #343c45; --bar: #6ea3e8; --back: #14181c; --card: #1b2026;
    --band: #1c242d; --faint: #3d5677; --bad: #ff6b6b; --c0: #6ea8f0; --c1: #f0a04b; --c2: #6cc070; --c3: #b594e8;
    --c4: #4fc3c3; --c5: #e486c3; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 64rem;
  margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
a { color: var(--bar); text-decoration: none; } a:hover { text-decoration: underline; }
nav { margin: 1rem 0 0; font-size: .9rem; } nav a { margin-right: .9rem; white-space: nowrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: .8rem; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem 1.2rem; }
figure { margin: .6rem 0; break-inside: avoid; } figcaption { font-weight: 600; font-size: .9rem; }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1.2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 600; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td { overflow-wrap: anywhere; } td:first-child span { overflow-wrap: normal; } tr { break-inside: avoid; }
code { font-size: .85em; } .soft { color: var(--soft); } .nowrap { white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.45; white-space: pre-wrap; }
.error { color: var(--bad); font-weight: 600; } .warning { color: var(--c1); font-weight: 600; }
.good { color: var(--c2); font-weight: 600; } .note { color: var(--soft); }
.alert { border-left: 4px solid var(--bad); background: var(--card); padding: .6rem .9rem; border-radius: 4px; }
svg { width: 100%; height: auto; } svg.bars { max-width: 45rem; } svg.bars text { fill: var(--soft); font-size: 11px; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --back: #fff; --card: #fff; --band: #eee;
    --faint: #bbb; }
  body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; } h2 { break-after: avoid; }
}
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


def section(name: str, text: str) -> Html:
    """Return the heading of a section that `contents` leads to; `name` is a plain word."""
    return Html(f'<h2 id="{escape(name)}">{escape(text)}</h2>')


def contents(sections: Iterable[tuple[str, str]]) -> Html:
    """Return links to sections, by name and text."""
    links = "".join(f'<a href="#{escape(name)}">{escape(text)}</a>' for name, text in sections)
    return Html(f"<nav>{links}</nav>")


def tiles(facts: Iterable[tuple[str, str, str]]) -> Html:
    """Return facts beside each other: name, value and a remark."""
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>'
        for name, value, remark in facts
    )
    return Html(f'<div class="tiles">{cells}</div>')


def side_by_side(figures: Iterable[Html]) -> Html:
    """Return figures two in a row, where the page is wide enough."""
    return Html(f'<div class="charts">{"".join(figure.text for figure in figures)}</div>')


def alert(text: str) -> Html:
    """Return a paragraph that must be seen."""
    return Html(f'<p class="alert">{escape(text, _MAX_ALERT)}</p>')


def verbatim(text: str) -> Html:
    """Return text with its own lines, such as a config."""
    shown = "\n".join(escape(line) for line in text[:_MAX_VERBATIM].splitlines()[:_MAX_LINES])
    return Html(f"<pre>{shown}</pre>")


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
    return styled(kind, kind)


def styled(text: str, kind: str) -> Html:
    """Return text in the colour of a kind: error, warning, good, note or soft."""
    return Html(f'<span class="{escape(kind)}">{escape(text)}</span>')


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


def _svg(label: str, parts: Iterable[str]) -> Html:
    inner = "\n".join(parts)
    return Html(
        f'<svg class="bars" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">\n{inner}\n</svg>'
    )


def _axis(high: float) -> str:
    base = _HEIGHT - _BOTTOM
    return (
        f'<line x1="{_LEFT}" y1="{base}" x2="{_WIDTH}" y2="{base}" stroke="var(--line)"/>'
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{_number(high)}</text>'
        f'<text x="{_LEFT - 6}" y="{base}" text-anchor="end">0</text>'
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
