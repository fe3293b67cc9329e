"""A chat template reaches nothing and wastes little."""

from __future__ import annotations

import resource

import pytest

from dist_ft.model.chat.sandbox import Template

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def render(source: str) -> str:
    return Template(source, {"eos_token": "</s>"}).render(TURNS, [], False)


WASTE = {
    "a long product": "{{ 'a' * 10 ** 9 }}",
    "a product the other way round": "{{ 10 ** 9 * 'a' }}",
    "a long list": "{{ [0] * 10 ** 9 }}",
    "a tower of powers": "{{ 10 ** (10 ** 10) }}",
    "squares of squares": "{% set n = namespace(x=3) %}{% for _ in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a wide format": "{{ '%10000000000d' % 1 }}",
    "a wide format of the other kind": "{{ '{:>10000000000}'.format(1) }}",
    "a wide filter": "{{ 'a' | center(10 ** 10) }}",
    "a wide join": "{{ range(100000) | join('a' * 1000000) }}",
    "doubled text": "{% set n = namespace(x='ab') %}{% for _ in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a huge range": "{% for _ in range(10 ** 9) %}{% endfor %}",
    "loops in loops": "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a loop without end": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "a long text": "{% for _ in range(20) %}{{ 'a' * 100000 }}{% endfor %}",
    "endless slices": "{{ [1] | slice(10 ** 12) | map('length') | sum }}",
    "a wall of words": "{{ lipsum(n=10 ** 9) }}",
}


@pytest.mark.parametrize("waste", sorted(WASTE))
def test_a_template_that_wastes_time_or_memory_is_stopped(waste: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(Exception):  # noqa: B017 - a template is a program: it can raise anything
        render(WASTE[waste])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert render("{{ messages[0]['content'] }}") == "hi"


def test_a_tree_of_macros_is_stopped() -> None:
    tree = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    with pytest.raises(Exception, match="turns of loops"):
        render(tree)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{{ n.__init__.__globals__ }}",
        "{{ dict.__globals__.x }}",
        "{{ strftime_now.__self__.x }}",
        "{{ (messages | count_iteration).__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ joiner.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_reaches_out_is_refused(attack: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        render(attack)


def test_nothing_of_a_text_changes_from_day_to_day_or_from_call_to_call() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
    with pytest.raises(Exception, match="random"):
        render("{{ [1, 2, 3] | random }}")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ eos_token }}{{ bos_token }}", "</s>"),
        ("{{ {'ü': '<'} | tojson }}", '{"ü": "<"}'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "hello!"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{% set n = namespace(a=1) %}{% set n.b = 2 %}{{ n.a + n.b }}", "3"),
        ("{{ dict(a=1).a }}{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 3 * 4 }}{{ 1.5 * 2 }}", "1abab1024123.0"),
        ("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "TrueTrueFalse"),
    ],
)
def test_what_stock_templates_use_is_there(source: str, text: str) -> None:
    assert render(source) == text
