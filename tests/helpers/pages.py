"""Reads an HTML page as a browser would begin to, and checks that nothing in it can act."""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

TAGS = (
    " html head meta title style body h1 h2 p br b code pre div nav a table tr th td svg rect text line polyline span "
    "figure figcaption g path defs clippath use "
)
ATTRIBUTES = (
    " lang charset http-equiv content name class viewbox role aria-label x y x1 y1 x2 y2 width height fill stroke "
    "stroke-width points text-anchor id style d clip-path transform href "
)
_EMPTY = ("meta", "br", "line")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.ids: set[str | None] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert f" {tag} " in TAGS, f"<{tag}>"
        assert all(f" {name} " in ATTRIBUTES for name, _ in attrs), attrs
        for name, value in attrs:
            if name == "href":  # within the page only
                assert (value or "").startswith("#"), attrs
            if name in ("style", "clip-path"):
                assert re.fullmatch(r"(url\(#[\w-]+\)|[\w\s:;.,()#-])*", value or ""), attrs
            if name == "id":
                assert value not in self.ids, value
                self.ids.add(value)
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data}")


def check_inert(page: str) -> None:
    """Fails unless every tag and attribute is one of those that only show something, and all are closed."""
    _read(page)


def texts_of(page: str) -> list[str]:
    """Returns the texts of a page, as they are shown."""
    return _read(page).texts


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert all(c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" for c in page)
    return reader
