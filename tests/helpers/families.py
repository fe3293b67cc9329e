"""Tiny random models of four families, written as ordinary model directories. Every vector is random, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from dist_ft.model.embedded import materialise

FAMILIES = ("llama", "gpt2", "qwen3", "gemma2")
TIED = frozenset({"gpt2", "qwen3", "gemma2"})
"""Families whose output layer is the embedding."""


def make_family(family: str, directory: Path, **changes: Any) -> Path:
    """Writes a random model of the family with the byte tokenizer of `tiny-random`; returns the directory.

    Fresh models have norms of one and biases of zero, which hides a tensor that was lost or swapped: each gets noise.
    """
    tokenizer = AutoTokenizer.from_pretrained(materialise("tiny-random"))
    config = _config(family, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, changes)
    state = torch.random.get_rng_state()
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention(family))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    torch.random.set_rng_state(state)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def attention(family: str) -> str:
    """The attention that computes the family as it was trained: SDPA cannot soft-cap the scores of Gemma 2."""
    return "eager" if family == "gemma2" else "sdpa"


def _config(family: str, num_tokens: int, eos: int, pad: int, changes: dict[str, Any]) -> PretrainedConfig:
    common = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": pad}
    if family == "gpt2":
        # Dropout wherever the family has it, save inside the attention kernel.
        drops = {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
        sizes = {"vocab_size": num_tokens, "n_positions": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
        return GPT2Config(**{**common, **drops, **sizes, **changes})
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    if family == "llama":
        # More rows than tokens, as in models whose vocabulary is padded.
        return LlamaConfig(**{**common, **sizes, "vocab_size": 320, "tie_word_embeddings": False, **changes})
    if family == "qwen3":
        return Qwen3Config(
            **{**common, **sizes, "vocab_size": num_tokens, "head_dim": 24, "tie_word_embeddings": True, **changes}
        )
    assert family == "gemma2"
    # Window and caps are small enough to be felt by sequences of 96 tokens.
    caps = {"sliding_window": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    heads = {"head_dim": 16, "query_pre_attn_scalar": 24, "vocab_size": 1031, "tie_word_embeddings": True}
    return Gemma2Config(**{**common, **sizes, **heads, **caps, **changes})
