"""Finds, loads and identifies the base model and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from pathlib import Path
from typing import Any, cast, get_args

import torch
import xxhash
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.utils.logging import disable_progress_bar

from dist_ft.config import Config, with_commit
from dist_ft.config.advice import QUANTISED
from dist_ft.config.training_sections import QuantizationConfig, QuantizationKind
from dist_ft.errors import ConfigError, ModelError
from dist_ft.model import hub
from dist_ft.model.chat.templates import template_text
from dist_ft.model.embedded import is_embedded, materialise
from dist_ft.model.intact import check_files, check_present
from dist_ft.printable import excerpt, printable

Tokenizer = PreTrainedTokenizerFast
"""What turns text into tokens and back."""
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What transformers raises on a file that is missing, no UTF-8, no JSON, or other JSON than it expects."""
_NUMBER = re.compile(r"\.\d+\.")
_SAMPLE_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


def model_dir(config: Config) -> Path:
    """Return the local directory of the base model: embedded, given, or fetched from the hub.

    Raises:
        ModelError: There is no such model, it has no safetensors weights, or files of it were not fetched.
    """
    name = config.model.name
    if is_embedded(name):
        return materialise(name)
    path = Path(name).expanduser()
    if not path.is_dir():
        path = hub.fetch(config)
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            f"model.name={name}: {path} has no *.safetensors file; other formats can run code when they are loaded. "
            "Convert it with save_pretrained"
        )
    check_present(path, f"model.name={name}")
    return path


def at_commit(config: Config) -> Config:
    """Return the config with a hub model pinned to the commit that its revision means now.

    Local and embedded models stay as they are.

    Raises:
        ModelError: See `hub.resolve`.
    """
    name = config.model.name
    is_local = is_embedded(name) or Path(name).expanduser().is_dir()
    return config if is_local else with_commit(config, hub.resolve(config))


def load_model_config(config: Config) -> PreTrainedConfig:
    """Load the transformers config of the base model.

    Raises:
        ModelError: The config cannot be read, or the model is quantised in a way that cannot be trained on.
    """
    path = model_dir(config)
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except _DAMAGE as error:
        raise ModelError(f"model.name={config.model.name}: its config cannot be read: {error}") from error
    if stored := stored_quantisation(config):
        quantised = quantisation_of(config)
        assert quantised is not None
        # Packed weights and scales are the file's; what they are computed with is ours (see `_quantisation`).
        compute_dtype = quantised.torch_dtype or config.model.torch_dtype
        found.quantization_config = {**stored, "bnb_4bit_compute_dtype": compute_dtype, "llm_int8_threshold": 0.0}
    for name, value in config.model.config_overrides.items():
        if name not in found.to_dict() and name not in found.attribute_map:
            raise ModelError(
                f"model.config_overrides.{name}={value}: the config of {config.model.name} has no {name}; it has "
                + ", ".join(sorted(key for key in found.to_dict() if not key.startswith("_")))
            )
        setattr(found, name, value)
    return found


def stored_quantisation(config: Config) -> dict[str, Any]:
    """Return the `quantization_config` of the base model's config.json; empty where its weights are as they are.

    Raises:
        ModelError: There is no such model, or its config cannot be read.
    """
    path = model_dir(config) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {})
    except _DAMAGE as error:
        raise ModelError(f"model.name={config.model.name}: its config cannot be read: {error}") from error


def quantisation_of(config: Config) -> QuantizationConfig | None:
    """Return how the frozen base is quantised: as its files are, otherwise as `model.quantization` says.

    Raises:
        ModelError: The files are quantised with another tool than bitsandbytes, or in another way than asked for.
    """
    asked, stored = config.model.quantization, stored_quantisation(config)
    if not stored:
        return asked
    name, method = config.model.name, str(stored.get("quant_method") or "bitsandbytes")
    if method != "bitsandbytes":
        raise ModelError(
            f"model.name={name} is quantised with {excerpt(method)} (quantization_config in its config.json), and only "
            "weights of bitsandbytes are trained on; name the published model that it was made of (`dist-ft import "
            f"--unquantised` knows many); {QUANTISED}"
        )
    kind = "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "fp4"))
    if kind not in get_args(QuantizationKind):
        raise ModelError(f"model.name={name}: its config.json has an unknown kind of weights, {excerpt(kind)}")
    if asked is not None and asked.kind != kind:
        raise ModelError(
            f"model.quantization.kind={asked.kind}, but the weights of model.name={name} are quantised as {kind} "
            "already; remove model.quantization to train on them, or name the model that they were made of"
        )
    compute_dtype = asked.compute_dtype if asked is not None else None
    double_quant = bool(stored.get("bnb_4bit_use_double_quant"))
    return QuantizationConfig(kind=cast(QuantizationKind, kind), double_quant=double_quant, compute_dtype=compute_dtype)


def load_model(config: Config) -> PreTrainedModel:
    """Load the base model in `model.dtype` on the CPU, or quantised on the device where bitsandbytes works.

    Raises:
        ModelError: The weights do not load.
    """
    model = _load(config, quantization=_quantisation(config))
    _keep_exact(model)
    return model


def check_length(config: Config) -> None:
    """Check that the base model takes sequences of `data.seq_len` tokens.

    Raises:
        ConfigError: It does not; the message has both values.
        ModelError: Its config cannot be read.
    """
    # Read as an attribute, because families spell the key differently and map it. Some use -1 for no limit.
    limit = getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < config.data.seq_len:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the model allows "
            f"(max_position_embeddings={limit} in the config of {config.model.name}); set data.seq_len <= {limit}"
        )


def check_weights(config: Config) -> None:
    """Check that the base model would load: that its files are whole, and hold every tensor in the config's shape.

    Reads headers only. transformers itself loads the model onto device `meta`, so names that a family converts count.

    Raises:
        ModelError: It would not load.
    """
    check_files(model_dir(config), f"model.name={config.model.name}")
    _quantisation(config)
    load_generation_config(config)  # transformers reads it with the weights, and fails on a damaged one in many ways
    if not stored_quantisation(config):  # packed weights have no shape to compare; the ranks' own load looks at them
        _load(config, device_map="meta")


def _load(
    config: Config, device_map: str | None = None, quantization: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    disable_progress_bar()
    path = model_dir(config)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=load_model_config(config),
            dtype=getattr(torch, config.model.torch_dtype),
            attn_implementation=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            device_map=device_map,
            quantization_config=quantization,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model.name={config.model.name}: cannot load {path}: {error}") from error
    # transformers fills what is missing with random numbers and a warning.
    if lacking := sorted(found["missing_keys"]):
        raise ModelError(
            f"model.name={config.model.name}: {len(lacking)} tensors are missing in {path}, the first is {lacking[0]}; "
            "restore the model"
        )
    if others := sorted(found["mismatched_keys"]):
        name, stored, wanted = others[0]
        raise ModelError(
            f"model.name={config.model.name}: {len(others)} tensors in {path} have other shapes than its config.json "
            f"says, the first is {name}: {list(stored)}, not {list(wanted)}; weights and config are of two models"
        )
    # Also layers that the config does not have are left out with a warning.
    kinds = {_NUMBER.sub(".0.", name) for name in model.state_dict()}
    more = sorted(name for name in found["unexpected_keys"] if _NUMBER.sub(".0.", name) in kinds)
    if more and "num_hidden_layers" not in config.model.config_overrides:
        number = model.config.get_text_config().num_hidden_layers
        raise ModelError(
            f"model.name={config.model.name}: {path} holds layers that its config.json (num_hidden_layers={number}) "
            f"does not have, such as {more[0]}; set model.config_overrides.num_hidden_layers={number} if that is meant"
        )
    return model


def _quantisation(config: Config) -> BitsAndBytesConfig | None:
    """Return what transformers needs to quantise while it loads (Dettmers et al. 2023); None for a base as it is.

    Each rank quantises on its own; the same weights give the same blocks.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    asked = quantisation_of(config)
    if asked is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"model.name={config.model.name} in {asked.kind} needs bitsandbytes; install dist-ft[quantised], or "
            "train on weights that are not quantised"
        )
    # int8 says on every call that it quantises inputs from 16 bits.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if stored_quantisation(config):
        return None  # the model's config says it
    if asked.kind == "int8":
        # With a threshold, the whole micro batch decides which columns are computed apart.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.kind,
        bnb_4bit_use_double_quant=asked.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, asked.torch_dtype or config.model.torch_dtype),
    )


def _keep_exact(model: PreTrainedModel) -> None:
    """Let quantised layers compute the same in evaluation as in training.

    On CPUs with AVX-512 bitsandbytes (0.50) packs 4-bit weights anew when a layer is first used for inference, with
    scales rounded to bfloat16, and unpacks the rounded ones for training: an evaluation would change the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Return a base model with plain linear layers that hold what its quantised ones compute with."""
    if not getattr(model, "is_quantized", False):
        return model
    plain: PreTrainedModel = model.dequantize()
    # transformers (5) writes a model as it was read, and would pack the weights again, which it cannot.
    plain._weight_conversions = [
        conversion
        for conversion in plain._weight_conversions or []
        if not any(type(step).__module__.endswith(".bitsandbytes") for step in _steps(conversion))
    ]
    return plain


def _steps(conversion: WeightTransform) -> list[ConversionOps]:
    return conversion.operations if isinstance(conversion, WeightConverter) else []


def skeleton(config: Config) -> PreTrainedModel:
    """Build the base model without memory for its weights (device `meta`); buffers are real.

    Raises:
        ModelError: It is no causal language model, its config makes no sense, or `model.attention` is not available.
    """
    model_config = load_model_config(config)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config  # a skeleton has the layers that an adapter sees
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                model_config,
                dtype=getattr(torch, config.model.torch_dtype),
                attn_implementation=config.model.attention,
                trust_remote_code=config.model.trust_remote_code,
            )
    except Exception as error:  # each family fails in its own way on a config that makes no sense
        raise ModelError(
            f"model.name={config.model.name} with model.attention={config.model.attention}: "
            f"{printable(str(error), 500) or type(error).__name__}"
        ) from error
    model.tie_weights()  # emptying has cut the ties
    return model


def load_tokenizer(config: Config) -> PreTrainedTokenizerFast:
    """Load the tokenizer, with `data.chat_template` in place of its own template when given.

    Raises:
        ModelError: No tokenizer, or one without offsets.
    """
    path = model_dir(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
    except Exception as error:  # the Rust library has no type of its own
        raise ModelError(
            f"model.name={config.model.name}: its tokenizer cannot be read ({type(error).__name__}: "
            f"{printable(str(error), 300)}); fetch its files again (tokenizer.json, tokenizer_config.json)"
        ) from error
    _set_special_tokens(tokenizer, config)
    if config.data.chat_template is not None:
        tokenizer.chat_template = template_text(config.data)
    if not tokenizer.is_fast:
        raise ModelError(f"model.name={config.model.name}: the tokenizer gives no character offsets (not a fast one)")
    return tokenizer


def special_tokens(config: Config) -> dict[str, str]:
    """Return the special tokens that the config sets, by their names in transformers, such as `eos_token`."""
    tokens = config.model.special_tokens
    named = {"eos_token": tokens.eos, "bos_token": tokens.bos, "pad_token": tokens.pad, "unk_token": tokens.unk}
    return {name: token for name, token in named.items() if token is not None}


def _set_special_tokens(tokenizer: PreTrainedTokenizerFast, config: Config) -> None:
    named, more = special_tokens(config), config.model.special_tokens.additional
    vocabulary = tokenizer.get_vocab() if named or more else {}
    for name, token in [*named.items(), *(("additional", token) for token in more)]:
        if token not in vocabulary:
            raise ModelError(
                f"model.special_tokens.{name.removesuffix('_token')}={token}: the tokenizer of {config.model.name} has "
                "no such token, and none are added; name one of its own, or a model that was saved with it"
            )
    if named:
        tokenizer.add_special_tokens(dict(named))
    if more:
        tokenizer.add_special_tokens({"additional_special_tokens": more}, replace_extra_special_tokens=False)


def load_generation_config(config: Config) -> GenerationConfig | None:
    """Return the base model's generation config, or None when it has none.

    Raises:
        ModelError: It is damaged.
    """
    path = model_dir(config)
    if not (path / "generation_config.json").is_file():
        return None
    try:
        generation = GenerationConfig.from_pretrained(path)
        ends = generation.eos_token_id
        if ends is not None and not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
            raise TypeError(f"eos_token_id is {excerpt(ends)}, expected a token's number or a list of them")
    except _DAMAGE as error:
        raise ModelError(
            f"model.name={config.model.name}: generation_config.json cannot be read ({printable(str(error), 200)}); "
            "replace it, or delete it if the model needs none"
        ) from error
    return generation


def stop_tokens(tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig | None) -> set[int]:
    """Return the tokens at which generation stops. Chat models often name the end of a turn in one of two places only.

    Args:
        tokenizer: Its EOS token is one.
        generation: The model's generation config, which may name several.
    """
    named = generation.eos_token_id if generation is not None else None
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return {token for token in found if token is not None}


def fingerprint(config: Config) -> str:
    """Return a hash that identifies the base weights.

    It covers config.json, and of every safetensors file the size and 64 evenly spaced blocks of 64 KiB, the header
    among them. That takes a fraction of a second for any size, and tells a changed, retrained or truncated model apart.
    """
    path = model_dir(config)
    hasher = xxhash.xxh3_128((path / "config.json").read_bytes())
    if config.model.config_overrides:
        hasher.update(repr(sorted(config.model.config_overrides.items())).encode())
    if config.model.quantization is not None:
        hasher.update(repr(config.model.quantization).encode())
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        hasher.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for block in range(_SAMPLE_BLOCKS):
                stream.seek(block * max(0, size - _BLOCK_BYTES) // (_SAMPLE_BLOCKS - 1))
                hasher.update(stream.read(_BLOCK_BYTES))
    return hasher.hexdigest()


def num_embedding_rows(config: Config) -> int:
    """Return how many tokens the base model has a row for in its embedding."""
    return int(skeleton(config).get_input_embeddings().weight.shape[0])


def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of everything that changes how a conversation becomes tokens."""
    backend = tokenizer.backend_tokenizer.to_str()
    template = tokenizer.chat_template
    return xxhash.xxh3_128_hexdigest(f"{backend}\0{template}\0{tokenizer.special_tokens_map}".encode())
