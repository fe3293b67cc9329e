"""Ollama's Modelfile: chat templates that can be said there, and those that cannot."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from dist_ft.model.chat.render import Renderer
from dist_ft.model.embedded import byte_tokenizer
from dist_ft.model.gguf.modelfile import find_turns, modelfile
from tests.helpers.chat_templates import NAMED, STOCK

FAMILIES = {**STOCK, **NAMED}
SAID = ("chatml", "smollm2", "llama3", "qwen2.5", "qwen3", "gemma3", "phi3", "apertus", "named chatml")


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    tokenizer = byte_tokenizer()
    named = {"eos_token": family.eos} | ({"bos_token": family.bos} if family.bos else {})
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.marks], **named})
    tokenizer.chat_template = family.template
    return tokenizer


@pytest.mark.parametrize("name", SAID)
def test_a_template_of_turns_is_said_as_it_is(name: str) -> None:
    tokenizer = tokenizer_of(name)
    turns = find_turns(tokenizer)
    assert turns is not None
    renderer = Renderer(tokenizer)
    for number in (1, 3, 5):
        roles = ["user", "assistant"] * 3
        messages = [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles[:number])]
        assert turns.render(messages) == renderer.text(messages, add_generation_prompt=True)


def test_a_template_that_does_more_than_turns_is_left_to_the_file() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = modelfile("./model.gguf", None, tokenizer, ["<|im_end|>"])
    assert "TEMPLATE" not in text
    assert text.startswith("FROM ./model.gguf\n#")


def test_a_modelfile_names_base_adapter_template_and_stops() -> None:
    tokenizer = byte_tokenizer()
    assert modelfile("llama3.2:1b", "./adapter.gguf", tokenizer, ["<|im_end|>", 'a"b']) == (
        "FROM llama3.2:1b\n"
        "ADAPTER ./adapter.gguf\n"
        'TEMPLATE """{{- range .Messages }}\n'
        '{{- if eq .Role "assistant" }}{{- .Content }}{{- "<|im_end|>\\n" }}{{- end }}\n'
        '{{- if eq .Role "system" }}{{- "<|im_start|>system\\n" }}{{- .Content }}{{- "<|im_end|>\\n" }}{{- end }}\n'
        '{{- if eq .Role "user" }}{{- "<|im_start|>user\\n" }}{{- .Content }}'
        '{{- "<|im_end|>\\n<|im_start|>assistant\\n" }}{{- end }}\n'
        '{{- end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop "a\\"b"\n'
    )
