"""Many records at once give what each gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dist_ft.errors import DataError, ModelError
from dist_ft.model.chat.render import Renderer, find_trained
from dist_ft.model.embedded import byte_tokenizer
from dist_ft.records import Completion, Conversation, Record

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content | upper }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*contents: str, first: str = "user") -> Conversation:
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(contents)
    return Conversation([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)])


RECORDS: list[Record] = [
    turns("hi", "yes"),
    turns("no", "hi", "yes", first="system"),
    Completion("two and two is", " four"),
    turns("ü 😀", "é\n", "again", " so "),
    Completion("", "text"),
    turns("only a question"),
]


def renderer(template: str, train_on: str = "assistant") -> Renderer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Renderer(tokenizer, train_on)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, REWRITES])
@pytest.mark.parametrize("train_on", ["assistant", "last"])
def test_many_records_give_what_each_gives_alone(template: str, train_on: str) -> None:
    render = renderer(template, train_on)

    def alone(record: Record) -> Any:
        try:
            return render(record)
        except DataError as error:
            return str(error)

    together = render.render_many(RECORDS)
    assert [str(found) if isinstance(found, DataError) else found for found in together] == list(map(alone, RECORDS))
    assert render.render_many([]) == []


def test_an_error_is_that_of_its_row_and_the_others_are_rendered() -> None:
    found = renderer(REFUSES_SYSTEM).render_many(RECORDS)
    assert [isinstance(each, DataError) for each in found] == [False, True, False, False, False, False]
    assert "no system" in str(found[1])


def test_a_tokenizer_without_a_template_is_an_error_of_the_model() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Renderer(tokenizer).render_many(RECORDS)


def test_what_others_have_set_on_the_tokenizer_changes_nothing() -> None:
    tokenizer = byte_tokenizer()
    render = Renderer(tokenizer)
    before = render.render_many(RECORDS[:1] + RECORDS[2:])
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=3)
    assert render.render_many(RECORDS[:1] + RECORDS[2:]) == before


def _bytes() -> Tokenizer:
    return byte_tokenizer().backend_tokenizer


def _merging() -> Tokenizer:
    """Words with the space before them, and half characters, as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "a"), ("Ġ", "ð"), ("ð", "Ł"), ("Ġ", "Ġ"), ("a", "b"), ("Ċ", "Ċ"), ("Ã", "¼")]
    vocab = {token: i for i, token in enumerate([*alphabet, *map("".join, merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def _metaspace() -> Tokenizer:
    pieces = ["<unk>", "▁", "a", "b", "▁a", "▁b", "ab", "▁▁", "\n", "ü"]
    made = Tokenizer(models.Unigram([(piece, -float(len(pieces) - i)) for i, piece in enumerate(pieces)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made


def _words() -> Tokenizer:
    """Drops white space and changes the text before it looks."""
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "ab": 2}, unk_token="[UNK]"))
    made.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.StripAccents()])
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


TOKENIZERS = {"bytes": _bytes(), "merging": _merging(), "metaspace": _metaspace(), "words": _words()}


def trained_by_definition(
    text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]
) -> list[bool]:
    """A token is trained when its first character is, or its last, with nothing but white space before the span."""
    inside = [any(start <= at < end for start, end in spans) for at in range(len(text) + 1)]
    found = []
    for at, until in offsets:
        if inside[at] or at >= until - 1 or not inside[until - 1]:
            found.append(inside[at])
        else:
            found.append(text[at : inside.index(True, at)].isspace())
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text("ab  \nü😀ﬁ", max_size=30), data=st.data())
def test_the_tokens_of_spans_are_those_of_the_definition(name: str, text: str, data: st.DataObject) -> None:
    edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6).filter(lambda e: len(e) % 2 == 0)))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    encoding = TOKENIZERS[name].encode(text, add_special_tokens=False)
    assert find_trained(text, spans, encoding) == trained_by_definition(text, spans, encoding.offsets)
