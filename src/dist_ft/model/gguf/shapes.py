"""Says how llama.cpp lays out the families that can be exported: architecture, hyperparameters, changed tensors.

It leaves the tokenizer to `vocabulary.py` and the file to `gguf_file.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_ft.errors import ModelError

CONVERTER = "llama.cpp's convert_hf_to_gguf.py"
_GEMMA_3_WINDOWS = 6
"""In Gemma 3 every sixth layer sees everything. llama.cpp has this number in its code, not in the file."""
_GEMMA_3_LOCAL_THETA = 10_000.0
_LARGEST_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose scores llama.cpp scales by hidden_size / heads instead of head_dim."""


@dataclass(frozen=True)
class Family:
    """A family as llama.cpp lays it out.

    Attributes:
        arch: Its architecture there.
        permutes_heads: Whether the two halves of each head's rows in q and k are interleaved, for llama.cpp's rotation.
        norm_offset: What is added to the weights of norms.
    """

    arch: MODEL_ARCH
    permutes_heads: bool = False
    norm_offset: float = 0.0


_FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, permutes_heads=True),
    "mistral": Family(MODEL_ARCH.LLAMA, permutes_heads=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "gemma2": Family(MODEL_ARCH.GEMMA2, norm_offset=1.0),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, norm_offset=1.0),
}


def find_family(config: PreTrainedConfig) -> Family:
    """Return how llama.cpp lays out a model.

    Raises:
        ModelError: It is of another family, or llama.cpp computes something else than its config says.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"--format gguf writes {', '.join(_FAMILIES)}, and the model is {config.model_type}; export it with "
            f"`dist-ft export RUN --merge --to DIR` and convert DIR with {CONVERTER}"
        )
    if odd := _unknown_to_llama_cpp(config):
        raise ModelError(
            f"--format gguf: llama.cpp computes a {config.model_type} model otherwise than {odd} in its config; "
            "serve it with `dist-ft serve`, or export it with --format hf"
        )
    return family


def add_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Add what llama.cpp has to know of the shape of a model."""
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings", config.max_position_embeddings)
        )
    if config.model_type in _LARGEST_GEMMAS:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping is not None:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rope_divisors(config: PreTrainedConfig) -> torch.Tensor | None:
    """Return by what llama.cpp divides each frequency of the rotation, [head_dim / 2]; None for 1.

    Llama 3.1 slows down its low frequencies, which the file says as a tensor `rope_freqs.weight`.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return (1.0 / rope["rope_theta"] ** exponents) / slowed


def changed_rows(family: Family, config: PreTrainedConfig, module: str, rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of a weight, bias or LoRA matrix B as llama.cpp wants them.

    Args:
        family: The model's family.
        config: The model's config.
        module: Name of the module, such as `model.layers.0.self_attn.q_proj`.
        rows: [rows, ...]
    """
    if family.permutes_heads and module.endswith((".q_proj", ".k_proj")):
        heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
        # [heads, half, head_dim / 2, ...] → [heads, head_dim / 2, half, ...]
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)
    if family.norm_offset and module.endswith("norm"):
        return rows + family.norm_offset
    return rows


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the rotation of the layers that see everything."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head; Llama's config need not have it, and then it follows from the others."""
    given: int | None = config.to_dict().get("head_dim")
    return given or config.hidden_size // config.num_attention_heads


def _context_length(config: PreTrainedConfig) -> int:
    """Return how long a text may be. llama.cpp knows no windows but Gemma's: a longer text would be seen otherwise."""
    values = config.to_dict()
    longest: int = values["max_position_embeddings"]
    window = values.get("sliding_window")
    slides = config.model_type == "mistral" or "sliding_attention" in (values.get("layer_types") or ())
    return min(longest, window) if window and slides and config.model_type not in _LARGEST_GEMMAS else longest


def _unknown_to_llama_cpp(config: PreTrainedConfig) -> str | None:
    """Return a setting that llama.cpp would not follow; None if there is none."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    known = {"default", "linear", "yarn"} | ({"llama3"} if config.model_type in ("llama", "mistral") else set())
    # YaRN's other numbers have their defaults in both.
    extra = {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}
    if kind not in known or (kind == "yarn" and any(rope.get(key) is not None for key in extra)):
        return f"rope_parameters={rope}"
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return f"partial_rotary_factor={share}"
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        return f"head_dim={_head_dim(config)} (it has {config.hidden_size // config.num_attention_heads})"
    activation = config.hidden_act if config.model_type not in _LARGEST_GEMMAS else config.hidden_activation
    expected = "gelu_pytorch_tanh" if config.model_type in _LARGEST_GEMMAS else "silu"
    if activation != expected:
        return f"hidden_act={activation} (it has {expected})"
    return _unknown_of_gemma(config) if config.model_type in _LARGEST_GEMMAS else None


def _unknown_of_gemma(config: PreTrainedConfig) -> str | None:
    is_largest = config.num_hidden_layers == _LARGEST_GEMMAS[config.model_type]
    scale = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
    period = 2 if config.model_type == "gemma2" else _GEMMA_3_WINDOWS
    layers = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(config.num_hidden_layers)]
    local = config.rope_parameters.get("sliding_attention", {})
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar={config.query_pre_attn_scalar} (it has {scale})"
    if list(config.layer_types) != layers:
        return f"layer_types (it has windows in all but every {period}th layer)"
    if config.model_type == "gemma3_text" and local.get("rope_theta") != _GEMMA_3_LOCAL_THETA:
        return f"rope_parameters.sliding_attention={local} (it has rope_theta={_GEMMA_3_LOCAL_THETA:.0f})"
    if not config.tie_word_embeddings:
        return "tie_word_embeddings=False"
    return None
