"""Files in GGUF, read back by transformers and by the package `gguf`: weights, adapters, tokenizers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from dist_ft.errors import ModelError
from dist_ft.model.gguf.gguf_adapter import write_adapter
from dist_ft.model.gguf.gguf_file import read_model, write_model
from dist_ft.model.gguf.shapes import find_family
from dist_ft.model.gguf.vocabulary import check_tokenizer, pre_tokenizer
from tests.helpers.gguf_cases import CASES, byte_level, make_case, split

TOKENS = torch.arange(3, 90).unsqueeze(0)
ROUNDING = {"f32": 1e-5, "f16": 5e-3, "bf16": 3e-2, "q8_0": 1e-1}
"""Largest difference of a logit, relative to the largest: what each type keeps of a number."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model(name: str, tmp_path: Path) -> None:
    model, tokenizer = make_case(name, tmp_path)
    write_model(model, tmp_path, tmp_path / "model.gguf", "f32", "tiny")
    wanted, found = logits(model), logits(read_model(tmp_path / "model.gguf", model.config))
    assert (wanted - found).abs().max() <= ROUNDING["f32"] * wanted.abs().max()
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["tokenizer.ggml.pre"] == CASES[name].pre
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    assert len(fields["tokenizer.ggml.tokens"]) == model.config.vocab_size
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == TokenType.CONTROL


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rounded_files_are_as_near_as_their_type(dtype: str, tmp_path: Path) -> None:
    model, _ = make_case("qwen2", tmp_path)
    write_model(model, tmp_path, tmp_path / "model.gguf", dtype, "tiny")
    wanted, found = logits(model), logits(read_model(tmp_path / "model.gguf", model.config))
    assert (wanted - found).abs().max() <= ROUNDING[dtype] * wanted.abs().max()
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == dtype
    assert kinds["output_norm.weight"] == "f32"


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_base_and_adapter_add_up_to_the_merged_model(name: str, use_rslora: bool, tmp_path: Path) -> None:
    model, _ = make_case(name, tmp_path)
    write_model(model, tmp_path, tmp_path / "base.gguf", "f32", "tiny")
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_rslora=use_rslora)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf", "tiny")
    write_model(adapted.merge_and_unload(), tmp_path, tmp_path / "merged.gguf", "f32", "tiny")
    base, added, merged = (tensors(tmp_path / f"{stem}.gguf") for stem in ("base", "adapter", "merged"))
    alpha = GGUFReader(tmp_path / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    assert len(added) == 2 * 7 * model.config.num_hidden_layers
    for key, weight in base.items():
        if f"{key}.lora_a" in added:
            a, b = added[f"{key}.lora_a"], added[f"{key}.lora_b"]
            weight = weight + alpha / len(a) * b @ a  # as llama.cpp does
        np.testing.assert_allclose(weight, merged[key], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "what"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "lm_head"), ({}, "lm_head")],
)
def test_what_an_adapter_cannot_say_is_refused(options: dict[str, Any], what: str, tmp_path: Path) -> None:
    model, _ = make_case("llama", tmp_path)
    targets = ["q_proj"] if options else ["q_proj", "lm_head"]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, **options))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelError, match=f"{what}.*--merge"):
        write_adapter(tmp_path / "adapter", model.config, tmp_path / "adapter.gguf", "tiny")


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (PretrainedConfig(), "convert_hf_to_gguf"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_parameters"),
        (Qwen3Config(hidden_act="gelu"), "hidden_act=gelu"),
        (Qwen2Config(head_dim=64), "head_dim=64"),
        (Gemma2Config(query_pre_attn_scalar=24), "query_pre_attn_scalar=24"),
        (Gemma2Config(tie_word_embeddings=False), "tie_word_embeddings"),
        (Gemma2Config(layer_types=["full_attention"] * 26), "layer_types"),
    ],
    ids=["family", "rotation", "activation", "heads", "scale", "untied", "windows"],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(config: PretrainedConfig, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        find_family(config)


def test_an_unknown_way_to_split_text_is_refused_with_the_way_out() -> None:
    described = json.loads(byte_level(split(r"\w+|\W+")).to_str())
    with pytest.raises(ModelError, match=r"\\w\+.*convert_hf_to_gguf"):
        pre_tokenizer(described)
    grouped = byte_level(pre_tokenizers.Digits(individual_digits=False), use_regex=True)
    with pytest.raises(ModelError, match="individual_digits"):
        check_tokenizer(json.loads(grouped.to_str()), 10_000)


def test_a_model_with_fewer_rows_than_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="700 tokens and the model 512 rows"):
        check_tokenizer(json.loads(byte_level(use_regex=True).to_str()), 512)
