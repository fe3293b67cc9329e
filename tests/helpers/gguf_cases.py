"""Tiny random models of every family that GGUF is written for, each with a tokenizer of its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dist_ft.model.embedded import CHATML
from dist_ft.model.gguf.vocabulary import _LLAMA_3, _QWEN_2, _TEKKEN
from tests.helpers.paths import ROOT

ODD_TEXTS = (
    "Hello world",
    "  two  spaces\t\ttabs\n\n\nnew lines \r\n end  ",
    "12345 678901 3.14159 1,000,000",
    "It's we'RE I'll don'T",
    "über naïve café — “quotes” … ½ ② ①",
    "日本語のテキスト、漢字とかな",
    "한국어 텍스트",
    "עברית العربية",
    "😀👩‍👩‍👧‍👦🇩🇪 emoji",
    "\u00a0no break\u2003em\u200bzero",
    'x=y+z;\tif(a<b){return "c\\n";}\n',
    "<html><b>tags</b></html> &amp; <|im_start|>user",
    "/path/to/file.py:12 https://example.com/?q=1&r=%20",
    "CamelCase snake_case SCREAMING",
    "\n",
    "     ",
    " leading and trailing ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)
_MARKS = ("<s>", "<|im_start|>", "<|im_end|>")
_NUM_TOKENS = 700
_NUM_ROWS = 720
"""More rows than tokens, as in models whose vocabulary is padded."""
_SIZES: dict[str, Any] = {
    "vocab_size": _NUM_ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 32,
}  # fmt: skip
_GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 32}
_SLOW = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A family, as its tokenizer splits text, and llama.cpp's name for that."""

    config: Callable[..., PretrainedConfig]
    changes: dict[str, Any]
    tokenizer: Callable[[], Tokenizer]
    pre: str


def make_case(name: str, directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Writes a model in float32 and its tokenizer into a directory; no vector of it is zero or one."""
    case = CASES[name]
    backend = case.tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHATML
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = case.config(**{**_SIZES, **ids, **case.changes})
    state = torch.random.get_rng_state()
    torch.manual_seed(sorted(CASES).index(name))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.random.set_rng_state(state)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model, tokenizer


def byte_level(*steps: pre_tokenizers.PreTokenizer, use_regex: bool = False, **options: Any) -> Tokenizer:
    """A tokenizer of bytes that splits text in these steps."""
    backend = Tokenizer(models.BPE(**options))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_TOKENS - len(_MARKS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return _trained(backend, trainer)


def sentence_piece(puts_space_first: bool) -> Tokenizer:
    """A tokenizer of the kind that Llama 2 and Gemma have: spaces are letters, and unknown letters are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * puts_space_first + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    # Words only while it is trained, or it would learn whole lines.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    unknown = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_TOKENS - len(_MARKS), special_tokens=unknown, limit_alphabet=120, show_progress=False
    )
    backend = _trained(backend, trainer)
    backend.pre_tokenizer = None
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(undone)
    return backend


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """A step that splits by a pattern."""
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _trained(backend: Tokenizer, trainer: trainers.Trainer) -> Tokenizer:
    texts = [*ODD_TEXTS, *(ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in _MARKS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


CASES = {
    "llama": Case(
        LlamaConfig, {"rope_parameters": _SLOW}, lambda: byte_level(split(_LLAMA_3), ignore_merges=True), "llama-bpe"
    ),
    "llama with biases": Case(
        LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}, lambda: byte_level(use_regex=True), "gpt-2"
    ),
    "smollm": Case(
        LlamaConfig, {}, lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), "smollm"
    ),
    "mistral": Case(MistralConfig, {"sliding_window": 256}, lambda: sentence_piece(True), "default"),
    "mistral nemo": Case(
        MistralConfig, {"sliding_window": None}, lambda: byte_level(split(_TEKKEN), ignore_merges=True), "tekken"
    ),
    "qwen2": Case(Qwen2Config, {"head_dim": 16}, lambda: byte_level(split(_QWEN_2)), "qwen2"),
    "qwen3": Case(Qwen3Config, {"tie_word_embeddings": True}, lambda: byte_level(split(_QWEN_2)), "qwen2"),
    "gemma2": Case(Gemma2Config, _GEMMA, lambda: sentence_piece(False), "default"),
    "gemma3": Case(Gemma3TextConfig, {**_GEMMA, "num_hidden_layers": 6}, lambda: sentence_piece(False), "default"),
}
"""By name."""
