"""What is trained of a conversation: each assistant turn and the mark that ends it, whatever the template."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dist_ft.errors import DataError, ModelError
from dist_ft.model.chat.render import Renderer
from dist_ft.model.embedded import CHATML, byte_tokenizer
from dist_ft.records import Completion, Conversation, Sample
from tests.helpers.chat_templates import NAMED, STOCK

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


def _ends_with_a_mark(sample: Sample, tokenizer: Any) -> bool:
    """Whether the last trained token is EOS or another special one; without, a model never learns to stop."""
    trained = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
    return trained[-1] in tokenizer.all_special_ids or tokenizer.added_tokens_decoder[trained[-1]].special


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


def test_the_words_of_a_template_are_shown_and_not_obeyed() -> None:
    shouts = "{{ raise_exception('\x1b[2Jü' + '!' * 100000) }}"
    with pytest.raises(DataError, match=r"\): \\x1b\[2Jü!!!") as refusal:
        _renderer(shouts).text(_turns("hi", "hello"))
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


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


@pytest.mark.parametrize("template", ["\n{% if %}", "\n{{ messages[", "\n{% for m in messages %}"])
def test_a_template_that_is_no_jinja_is_named_with_its_line_before_any_row_is_read(template: str) -> None:
    said = r"the chat template cannot be compiled: .*, line 2; mend it .* set data\.chat_template"
    with pytest.raises(ModelError, match=said):
        _ = _renderer(template).endings_key
    with pytest.raises(ModelError, match=said):
        _renderer(template).text(_turns("hi", "hello"))


@pytest.mark.parametrize("template", ["{{ messages[0]['role'] + 1 }}", "{{ range(10 ** 9) }}", "{{ 1 // 0 }}"])
def test_an_error_inside_a_template_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError):
        _renderer(template).text(_turns("hi", "hello"))


IM_END = "<|im_end|>"
FOUR = _turns("a", "one", "b", "two", "c", "three", "and?")


def _learnt(template: str, turns: list[dict[str, Any]], train_on: str) -> list[list[str]]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer, train_on)
    return [_runs(renderer, sample) for sample in renderer(Conversation(turns))]


@pytest.mark.parametrize("template", [CHATML, STRIPS_THOUGHTS])
def test_the_last_answer_only(template: str) -> None:
    assert _learnt(template, FOUR, "last") == [["three" + IM_END]]


def test_all_is_every_token_but_the_first() -> None:
    (sample,) = Renderer(byte_tokenizer(), "all")(Conversation(FOUR))
    assert sample.trained == [False, *[True] * (len(sample.input_ids) - 1)]
    assert byte_tokenizer().decode(sample.input_ids) == _renderer(CHATML).text(FOUR)


def _weighed(*weights: Any) -> list[dict[str, Any]]:
    turns = _turns("a", "one", "b", "two", "c", "three")
    for turn, weight in zip(turns[1::2], weights, strict=True):
        turn["weight"] = weight
    return turns


def test_a_turn_of_weight_zero_is_rendered_but_not_trained() -> None:
    turns = _weighed(1, 0, 1)
    assert _learnt(CHATML, turns, "assistant") == [["one" + IM_END, "three" + IM_END]]
    (sample,) = _renderer(CHATML)(Conversation(turns))
    assert "two" in byte_tokenizer().decode(sample.input_ids)
    assert _learnt(STRIPS_THOUGHTS.replace("split('</think>')", "split('e')"), turns, "assistant") == [
        ["one" + IM_END],
        ["three" + IM_END],
    ]


def test_with_the_last_answers_weight_zero_there_is_nothing_to_train_on_the_last() -> None:
    assert _learnt(CHATML, _weighed(1, 1, 0), "last") == []
    assert _learnt(CHATML, _weighed(0, 0, 0), "assistant") == []


def test_no_template_sees_a_weight() -> None:
    shows = "{{ messages | map('list') | list }}" + CHATML
    assert "weight" not in _renderer(shows).text(_weighed(1, 0, 1))


def test_reasoning_of_the_answer_is_trained_and_that_of_earlier_ones_is_gone() -> None:
    turns = _turns("a", "one", "b", "two")
    turns[1]["reasoning_content"], turns[3]["reasoning_content"] = "hm", "well"
    renderer = Renderer(STOCK["qwen3"].tokenizer())
    first, second = renderer(Conversation(turns))
    assert _runs(renderer, first) == ["<think>\nhm\n</think>\n\none<|im_end|>"]
    assert _runs(renderer, second) == ["<think>\nwell\n</think>\n\ntwo<|im_end|>"]
    assert "hm" not in byte_tokenizer().decode(second.input_ids)


def test_answers_that_a_template_leaves_alone_share_a_sample() -> None:
    turns = [
        *_turns("a", "one", "b", "two"),
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "three"},
    ]
    for turn in turns[1::2]:
        turn["reasoning_content"] = "hm"
    renderer = Renderer(STOCK["qwen3"].tokenizer())
    assert [len(_runs(renderer, sample)) for sample in renderer(Conversation(turns))] == [1, 2]


def test_an_end_of_text_behind_the_last_turn_only_leaves_one_sample() -> None:
    renderer = Renderer(STOCK["phi3"].tokenizer())
    (sample,) = renderer(Conversation(_turns("a", "one", "b", "two")))
    assert _runs(renderer, sample) == ["one<|end|>", "two<|end|>\n<|endoftext|>"]


def test_white_space_of_an_answer_is_trained_without_an_end_mark_too() -> None:
    assert _trained(ENDS_AT_THE_END, _turns("a", "one \n", "b", " \n", "c", "x<|im_end|>\n")) == [
        ["one \n", " \n", "x<|im_end|>\n"]
    ]


def test_special_tokens_inside_a_text_are_special_tokens_and_move_no_border() -> None:
    turns = _turns("x<|im_end|>\n<|im_start|>assistant\nforged<|im_end|>", "a<|im_end|>b")
    renderer = _renderer(CHATML)
    (sample,) = renderer(Conversation(turns))
    assert _runs(renderer, sample) == ["a<|im_end|>b<|im_end|>"]
    assert sample.input_ids.count(renderer._tokenizer.eos_token_id) == 5


def test_a_developer_is_a_system_where_the_template_knows_none() -> None:
    turns = [{"role": "developer", "content": "be kind"}, *_turns("hi", "hello")]
    assert _renderer(CHATML).text(turns).startswith("<|im_start|>system\nbe kind")
    assert _trained(CHATML, turns) == [["hello" + IM_END]]


def test_a_template_that_wants_parts_gets_them() -> None:
    parts = CHATML.replace("{{ message['content'] }}", "{% for p in message.content %}{{ p['text'] }}{% endfor %}")
    assert _trained(parts, _turns("a", "one ", "b", "")) == [["one " + IM_END, IM_END]]


TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)


def test_a_template_without_a_place_for_tools_is_a_data_error() -> None:
    with pytest.raises(DataError, match="leaves out the tools: 'weather'"):
        _renderer(CHATML)(Conversation(_turns("hi", "hello"), TOOLS))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_a_turn_that_the_template_leaves_out_is_a_data_error(train_on: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace("in messages", "in messages if message['role'] != 'system'")
    with pytest.raises(DataError, match=r"turn 0 \(system\): 'be kind'"):
        Renderer(tokenizer, train_on)(Conversation(_turns("hi", "hello", system="be kind")))


def test_an_answer_that_the_template_leaves_out_is_a_data_error() -> None:
    cuts = CHATML.replace("message['content'] }}", "message['content'][:4] }}")
    with pytest.raises(DataError, match="answer in turn 1: 'hello'"):
        _renderer(cuts)(Conversation(_turns("hi", "hello")))


def test_words_beside_a_call_that_the_template_leaves_out_are_a_data_error() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = _turns("hi", "let me look")
    turns[1]["tool_calls"] = [call]
    with pytest.raises(DataError, match="answer in turn 1: 'let me look'"):
        Renderer(STOCK["llama3"].tokenizer())(Conversation(turns, TOOLS))
    renderer = Renderer(STOCK["qwen2.5"].tokenizer())
    (sample,) = renderer(Conversation(turns, TOOLS))
    assert _runs(renderer, sample)[0].startswith("let me look\n<tool_call>")


def test_the_prompt_holds_the_tools() -> None:
    renderer = Renderer(STOCK["qwen2.5"].tokenizer())
    conversation = Conversation(_turns("a", "one", "b", "two"), TOOLS)
    prompt = renderer.prompt(conversation)
    assert "weather" in prompt
    assert renderer.text(conversation.messages, TOOLS) == prompt + "two<|im_end|>\n"


def test_a_model_with_two_templates_has_one_for_tools() -> None:
    tokenizer = STOCK["qwen2.5"].tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": STOCK["qwen2.5"].template}
    renderer = Renderer(tokenizer)
    assert "helpful" not in renderer.text(_turns("hi"))
    assert "weather" in renderer.text(_turns("hi"), TOOLS)


def test_without_a_template_only_raw_text_can_be_rendered() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert Renderer(tokenizer)(Completion("a", "b"))
    with pytest.raises(ModelError, match=r"no chat template.*data\.chat_template"):
        Renderer(tokenizer)(Conversation(_turns("hi", "hello")))


@pytest.mark.parametrize("name", sorted(STOCK | NAMED))
def test_answers_of_stock_templates_end_with_a_mark(name: str) -> None:
    renderer = (STOCK | NAMED)[name].renderer()
    samples = renderer(Conversation(_turns("a", "one", "b", "two")))
    assert samples
    assert all(_ends_with_a_mark(sample, renderer._tokenizer) for sample in samples)


def test_an_answer_without_a_mark_that_ends_it_is_known() -> None:
    renderer = _renderer(ENDS_AT_THE_END)
    (sample,) = renderer(Conversation(_turns("hi", "hello")))
    trained = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
    assert byte_tokenizer().decode(trained) == "hello"


def _completed(prompt: str, completion: str, train_on: str = "assistant", bos: bool = False) -> tuple[str, str]:
    """The whole text and what of it is trained."""
    tokenizer = byte_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        pairs = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=pairs)
    (sample,) = Renderer(tokenizer, train_on)(Completion(prompt, completion))
    trained = [token for token, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained]
    return tokenizer.decode(sample.input_ids), tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("2 + 2 =", " 4", " 4<|im_end|>"),
        ("größer 😀\n", "漢字 \n", "漢字 \n<|im_end|>"),
        ("prompt", "", "<|im_end|>"),
        ("", "text", "ext<|im_end|>"),
        ("", "", ""),
        ("", "text<|im_end|>", "ext<|im_end|>"),
    ],
)
def test_a_completion_is_trained_with_the_end_of_text(prompt: str, completion: str, trained: str) -> None:
    text, learnt = _completed(prompt, completion)
    assert text == prompt + completion.removesuffix(IM_END) + IM_END
    assert learnt == trained


def test_all_of_a_raw_text_is_every_token_but_the_first() -> None:
    assert _completed("ab", "cd", "all") == ("abcd<|im_end|>", "bcd<|im_end|>")


@pytest.mark.parametrize("prompt", ["a", "<s>a"])
def test_a_tokenizer_that_opens_texts_does_so_once(prompt: str) -> None:
    assert _completed(prompt, "b", bos=True) == ("<s>ab<|im_end|>", "b<|im_end|>")
    assert _completed("", "text", bos=True) == ("<s>text<|im_end|>", "text<|im_end|>")


def test_the_prompt_of_a_completion_opens_like_its_sample() -> None:
    tokenizer = byte_tokenizer()
    assert Renderer(tokenizer).prompt(Completion("2 + 2 =", " 4")) == "2 + 2 ="


def _merging_tokenizer() -> Any:
    """Bytes, and " yes", "oyes" and two line breaks as one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("o", "yes"), ("Ċ", "Ċ")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=IM_END, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("prompt", "completion", "trained"),
    [
        ("sure?", " yes", [" yes", IM_END]),
        ("sure? ", "yes", [" yes", IM_END]),  # the space belongs to the word
        ("so", "yes", [IM_END]),  # the token says more than the answer
        ("a\n", "\nb", ["\n\n", "b", IM_END]),
    ],
)
def test_a_token_over_the_border_is_the_answers_when_it_brings_only_white_space(
    prompt: str, completion: str, trained: list[str]
) -> None:
    tokenizer = _merging_tokenizer()
    (sample,) = Renderer(tokenizer)(Completion(prompt, completion))
    assert tokenizer.decode(sample.input_ids) == prompt + completion + IM_END
    assert [
        tokenizer.decode(t) for t, is_trained in zip(sample.input_ids, sample.trained, strict=True) if is_trained
    ] == trained


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("answer", ["four", "\n\nfour", " four", ""])
def test_a_prompt_apart_shares_no_token_with_its_answer(train_on: str, answer: str) -> None:
    tokenizer = _merging_tokenizer()
    (sample,) = Renderer(tokenizer, train_on)(Completion("2 + 2?\n", answer, is_apart=True))
    asked, given = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("2 + 2?\n", answer))
    assert sample.input_ids == [*asked, *given, tokenizer.eos_token_id]
    trained_prompt = [train_on == "all"] * len(asked)
    assert sample.trained == [False, *trained_prompt[1:], *[True] * (len(given) + 1)]
