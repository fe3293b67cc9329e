"""What is trained of a conversation: each assistant turn and the mark that ends it, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.errors import DataError
from dist_ft.model.embedded import CHATML, byte_tokenizer
from dist_ft.model.render import Renderer
from dist_ft.records import Conversation, Sample

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
STRIPS_THOUGHTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS_WITH_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
REFUSES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system turns, please') }}{% endif %}"
    "{{ message['content'] }}<|im_end|>{% endfor %}"
)
ENDS_AT_THE_END = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def _renderer(template: str) -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    tokenizer.chat_template = template
    return Renderer(tokenizer)


def _turns(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """User and assistant in turn, a system turn first if given."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


def _runs(renderer: Renderer, sample: Sample) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs: list[list[int]] = []
    last = False
    for token, trained in zip(sample.input_ids, sample.trained, strict=True):
        if trained:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = trained
    return [renderer._tokenizer.decode(run) for run in runs]


def _trained(template: str, turns: list[dict[str, Any]]) -> list[list[str]]:
    renderer = _renderer(template)
    return [_runs(renderer, sample) for sample in renderer(Conversation(turns))]


STYLES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "thought": (PROMPTS_WITH_THOUGHT, "<|im_end|>"),
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": _turns("hi", "hello"),
    "several turns": _turns("a", "one", "b", "two", "c", "three"),
    "a system turn": _turns("hi", "hello", system="be kind"),
    "an empty answer": _turns("hi", ""),
    "an answer like the question": _turns("same", "same", "same", "same"),
    "the answer stands in the question": _turns("say: yes assistant", "yes"),
    "unicode": _turns(
        "größer als 😀?", "naïve 👩\u200d👩\u200d👧 漢字 \u202b\u05e2\u05d1\u202c", "und?", "e\u0301 ≠ é"
    ),
    "white space inside": _turns("hi", "a\n\n  b\tc"),
    "template syntax in the text": _turns("{{ 7 * 7 }}", "{% raise %} {{ messages }} {# x #}"),
    "JSON": _turns("give", '{"a": [1, 2], "b": "c"}'),
    "two answers in a row": [*_turns("hi", "one"), {"role": "assistant", "content": "two"}],
    "two questions in a row": [{"role": "user", "content": "first"}, *_turns("second", "answer")],
}


@pytest.mark.parametrize(
    ("style", "conversation"),
    # An answer that begins like the prompt's thought ("<") is a test of its own, below.
    [(s, c) for s in sorted(STYLES) for c in sorted(CONVERSATIONS) if (s, c) != ("thought", "an empty answer")],
)
def test_trained_is_each_answer_with_its_end_mark_and_nothing_else(style: str, conversation: str) -> None:
    template, end = STYLES[style]
    turns = CONVERSATIONS[conversation]
    answers = [turn["content"] + end for turn in turns if turn["role"] == "assistant"]
    assert _trained(template, turns) == [answers]


@pytest.mark.parametrize("style", sorted(STYLES))
def test_the_tokens_are_those_of_the_whole_conversation(style: str) -> None:
    renderer = _renderer(STYLES[style][0])
    turns = CONVERSATIONS["unicode"]
    (sample,) = renderer(Conversation(turns))
    assert renderer._tokenizer.decode(sample.input_ids) == renderer.text(turns)
    assert len(sample.trained) == len(sample.input_ids)


def test_the_text_starts_once_with_the_bos_mark() -> None:
    renderer = _renderer(LLAMA3)
    (sample,) = renderer(Conversation(_turns("hi", "hello")))
    bos = renderer._tokenizer.bos_token_id
    assert [i for i, token in enumerate(sample.input_ids) if token == bos] == [0]


def test_the_end_mark_is_one_token() -> None:
    renderer = _renderer(CHATML)
    (sample,) = renderer(Conversation(_turns("hi", "ok")))
    trained = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
    assert trained[-1] == renderer._tokenizer.eos_token_id
    assert len(trained) == 3


def test_a_trailing_user_turn_is_dropped() -> None:
    renderer = _renderer(CHATML)
    assert renderer(Conversation(_turns("a", "one", "and then?"))) == renderer(Conversation(_turns("a", "one")))


@pytest.mark.parametrize("turns", [[], _turns("only a question"), _turns("hi", system="be kind")])
def test_without_an_answer_there_is_nothing_to_train(turns: list[dict[str, Any]]) -> None:
    assert _renderer(CHATML)(Conversation(turns)) == []


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_conversation_that_opens_with_an_answer_trains_no_header(style: str) -> None:
    template, end = STYLES[style]
    turns = [{"role": "assistant", "content": "welcome"}, *_turns("hi", "hello")]
    assert _trained(template, turns) == [["welcome" + end, "hello" + end]]


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_an_answer() -> None:
    first, second = "<think>hm</think>one", "<think>well</think>two"
    turns = _turns("a", first, "b", second, "c")
    renderer = _renderer(STRIPS_THOUGHTS)
    assert _trained(STRIPS_THOUGHTS, turns) == [[first + "<|im_end|>"], [second + "<|im_end|>"]]
    texts = [renderer._tokenizer.decode(sample.input_ids) for sample in renderer(Conversation(turns))]
    assert texts == [renderer.text(turns[:2]), renderer.text(turns[:4])]
    assert "hm" in texts[0]
    assert "hm" not in texts[1]


def test_a_template_that_could_rewrite_but_does_not_gives_one_sample() -> None:
    assert _trained(STRIPS_THOUGHTS, _turns("a", "one", "b", "two")) == [["one<|im_end|>", "two<|im_end|>"]]


@pytest.mark.parametrize("answer", ["<answer>42</answer>", "<b>", "<", ""])
def test_an_answer_that_begins_like_the_prompts_thought_is_trained_whole(answer: str) -> None:
    assert _trained(PROMPTS_WITH_THOUGHT, _turns("hi", answer)) == [[answer + "<|im_end|>"]]


def test_a_template_without_an_end_mark_trains_the_answers() -> None:
    assert _trained(ENDS_AT_THE_END, _turns("a", "one", "b", "two")) == [["one", "two"]]


def test_the_prompt_ends_where_the_answer_begins() -> None:
    turns = _turns("a", "one", "b", "two")
    for template in (CHATML, LLAMA3, ENDS_AT_THE_END):
        renderer = _renderer(template)
        prompt = renderer.prompt(Conversation(turns))
        assert renderer.text(turns).startswith(prompt + "two")


def test_a_template_that_refuses_a_role_is_a_data_error() -> None:
    with pytest.raises(DataError, match="no system turns, please"):
        _renderer(REFUSES_SYSTEM)(Conversation(_turns("hi", "hello", system="be kind")))
    assert _trained(REFUSES_SYSTEM, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])


ATTACKS = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "builtins": "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "attr filter": "{{ ''|attr('__class__') }}",
    "format": "{{ '{0.__class__.__init__}'.format(raise_exception) }}",
    "changes the data": "{{ messages.append(1) }}",
    "changes a turn": "{{ messages[0].update({'content': 'x'}) }}",
}


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_a_template_that_reaches_for_python_gets_nothing(attack: str) -> None:
    turns = _turns("hi", "hello")
    try:
        text = _renderer(ATTACKS[attack]).text(turns)
    except DataError:
        text = ""
    assert not any(word in text for word in ("class", "function", "builtins", "root:"))
    assert turns == _turns("hi", "hello")


@pytest.mark.parametrize("attack", ["classes", "subclasses", "changes the data"])
def test_an_attack_is_named_as_a_data_error(attack: str) -> None:
    with pytest.raises(DataError, match="unsafe"):
        _renderer(ATTACKS[attack]).text(_turns("hi", "hello"))


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[", "{% for m in messages %}"])
def test_a_template_that_is_no_jinja_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError):
        _renderer(template).text(_turns("hi", "hello"))


@pytest.mark.parametrize("template", ["{{ messages[0]['role'] + 1 }}", "{{ range(10 ** 9) }}", "{{ 1 // 0 }}"])
def test_an_error_inside_a_template_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError):
        _renderer(template).text(_turns("hi", "hello"))
