"""Messages are formatted as the template wants them, found out by trying."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.model.chat.sandbox import Template
from dist_ft.model.chat.style import TemplateStyle, find_style
from dist_ft.model.embedded import CHATML
from tests.helpers.chat_templates import NAMED, STOCK

PARTS = (
    "{% for m in messages %}{% if m.content[0].type == 'image' %}{{ 'image' }}{% endif %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
WRITES_ARGUMENTS = (
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
)
JOINS_ARGUMENTS = WRITES_ARGUMENTS.replace("arguments }}", "arguments + '!' }}")
KNOWS_DEVELOPER = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}{{ m.content }}{% endfor %}"


def style(source: str) -> TemplateStyle:
    return find_style(Template(source, {}))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (CHATML, TemplateStyle(knows_developer=False)),
        (KNOWS_DEVELOPER, TemplateStyle()),
        (PARTS, TemplateStyle(knows_developer=False, content_as_parts=True)),
        (WRITES_ARGUMENTS, TemplateStyle(knows_developer=False, arguments_as_text=True)),
        (WRITES_ARGUMENTS.replace("arguments }}", "arguments | tojson }}"), TemplateStyle(knows_developer=False)),
        (CHATML.replace("'content'] }}", "'content'][:4] }}"), TemplateStyle(knows_developer=False)),
        ("{{ raise_exception('no') }}", TemplateStyle(knows_developer=False)),
    ],
)
def test_a_style_is_found_by_trying(source: str, found: TemplateStyle) -> None:
    assert style(source) == found


def test_a_template_that_joins_arguments_to_text_gets_text() -> None:
    assert style(JOINS_ARGUMENTS).arguments_as_text


@pytest.mark.parametrize("name", sorted(STOCK | NAMED))
def test_stock_templates_want_text_and_objects(name: str) -> None:
    assert style((STOCK | NAMED)[name].template) == TemplateStyle(knows_developer=False)


def _formatted(style: TemplateStyle, **message: Any) -> dict[str, Any]:
    return style.format({"role": "assistant", "content": "hi", **message})


def test_a_message_is_formatted_without_changing_the_row() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": {"ü": 1}}}
    message = {"role": "assistant", "content": "hi", "weight": 0, "name": None, "tool_calls": [call]}
    formatted = TemplateStyle(content_as_parts=True, arguments_as_text=True).format(message)
    assert formatted == {
        "role": "assistant",
        "content": [{"type": "text", "text": "hi"}],
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"ü": 1}'}}],
    }
    assert message["tool_calls"] == [call] and call["function"]["arguments"] == {"ü": 1}


def test_a_developer_is_a_system_for_those_who_do_not_know_him() -> None:
    assert _formatted(TemplateStyle(knows_developer=False), role="developer")["role"] == "system"
    assert _formatted(TemplateStyle(), role="developer")["role"] == "developer"


def test_reasoning_goes_by_both_its_names() -> None:
    assert _formatted(TemplateStyle(), reasoning_content="hm")["thinking"] == "hm"
