"""Special tokens in place of the tokenizer's own: in what is trained, where generation ends, and in exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.model.base import load_tokenizer, tokenizer_key
from dist_ft.model.chat.render import Renderer
from dist_ft.model.embedded import TINY, materialise
from dist_ft.model.exported import save_model_config, save_texts
from dist_ft.records import Completion, Sample
from tests.helpers.configs import tiny_config


def config_of(tmp_path: Path, **tokens: Any) -> Config:
    config = tiny_config(tmp_path)
    values = config.model_dump(mode="json")
    values["model"]["special_tokens"] = tokens
    return Config.model_validate(values)


def test_a_text_ends_with_the_token_that_the_config_names(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(config_of(tmp_path, eos="<|im_start|>"))
    (sample,) = Renderer(tokenizer).render_many([Completion("", "text")])[0]
    assert isinstance(sample, Sample)
    assert tokenizer.decode(sample.input_ids[-1]) == "<|im_start|>"
    assert tokenizer_key(tokenizer) != tokenizer_key(load_tokenizer(config_of(tmp_path)))


def test_a_token_of_the_vocabulary_becomes_one_that_no_text_falls_apart_into(tmp_path: Path) -> None:
    plain, special = load_tokenizer(config_of(tmp_path)), load_tokenizer(config_of(tmp_path, additional=["q"]))
    assert len(plain) == len(special)
    assert special.convert_ids_to_tokens(special("a q").input_ids)[-1] == "q"
    assert special.decode(special("aqa").input_ids, skip_special_tokens=True) == "aa"
    assert "<|im_start|>" in special.all_special_tokens  # those of the model stay


@pytest.mark.parametrize(
    ("tokens", "key"), [({"eos": "</s>"}, "eos=</s>"), ({"additional": ["<|im_start|>", "<new>"]}, "additional=<new>")]
)
def test_a_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path, tokens: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.special_tokens\.{key}: the tokenizer of tiny-random has no such"):
        load_tokenizer(config_of(tmp_path, **tokens))


def test_exports_have_them_in_tokenizer_config_and_generation_config(tmp_path: Path) -> None:
    config, out = config_of(tmp_path, eos="<|im_start|>", pad="q"), tmp_path / "out"
    out.mkdir()
    save_model_config(config, "LlamaForCausalLM", "float32", out)
    save_texts(config, out)
    exported, base = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(materialise(TINY))
    new, old = (base.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert (exported.eos_token, exported.pad_token, len(exported)) == ("<|im_start|>", "q", len(base))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == new
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [new, old]  # where it ended before, it still ends
    assert generation["pad_token_id"] == base.convert_tokens_to_ids("q")


def test_without_them_an_export_has_the_bases_own_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    save_texts(config_of(tmp_path), out)
    name = "generation_config.json"
    assert (out / name).read_bytes() == (materialise(TINY) / name).read_bytes()
