"""Selects the parameters of a model that are trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dist_ft.config import Config
from dist_ft.config.training_sections import QuantizationConfig
from dist_ft.errors import ConfigError
from dist_ft.memory import DTYPE_BYTES, ModelShape
from dist_ft.model.adapter import attach_adapter
from dist_ft.model.base import quantisation_of, stored_quantisation

_BLOCK = 64  # weights that share a scale (absmax) in NF4
_SCALE_BLOCK = 256  # scales that share one, with double quantisation


def trains_adapter(config: Config) -> bool:
    """Whether an adapter is trained, and the base model frozen."""
    return config.method.kind == "lora"


def select_trained(model: nn.Module, config: Config) -> nn.Module:
    """Attaches the adapter, or freezes what `method.freeze` names; returns the model to train.

    Raises:
        ConfigError: A name or pattern fits no part of the model, or nothing is left to train.
    """
    if trains_adapter(config):
        model = attach_adapter(model, config)
        if config.train.gradient_checkpointing:
            model.enable_input_require_grads()  # a recomputed layer has a gradient only if its input has one
    else:
        freeze, names = config.method.freeze, [name for name, _ in model.named_parameters()]
        for index, pattern in _unmatched(freeze, names):
            raise ConfigError(f"method.freeze.{index}={pattern} matches no parameter; they are called like {names[0]}")
        for name, parameter in model.named_parameters():
            if any(re.search(pattern, name) for pattern in freeze):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(f"method.freeze={freeze} matches every parameter; leave some to train")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    patterns = [group.pattern for group in config.optimizer.groups]
    for index, pattern in _unmatched(patterns, trained):
        raise ConfigError(
            f"optimizer.groups.{index}.pattern={pattern} matches no trained parameter of {config.model.name}; "
            f"they are called like {trained[0]}"
        )
    return model


def model_shape(model: nn.Module, config: Config, count: Callable[[torch.Tensor], int] = torch.numel) -> ModelShape:
    """Return what the memory formulas need to know about a model.

    Args:
        model: The model, adapter attached.
        config: Its run.
        count: Returns the elements of a parameter; at stage 3 a rank holds only a part of each.
    """
    text = model.config.get_text_config()
    return ModelShape(
        num_params=sum(count(p) for p in model.parameters()),
        num_trained=sum(count(p) for p in model.parameters() if p.requires_grad),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=getattr(text, "num_attention_heads", 1),  # state-space models have none
        vocab_size=text.vocab_size,
        dtype_bytes=DTYPE_BYTES[config.model.torch_dtype],
        saved_bytes=_saved_bytes(model, config),
    )


def _saved_bytes(model: nn.Module, config: Config) -> int:
    """Return how much smaller quantisation makes the weights of a model that is not quantised, in bytes.

    Args:
        model: The model that is not quantised, or its skeleton, adapter attached.
        config: Its run.
    """
    asked = quantisation_of(config)
    if asked is None:
        return 0
    head = model.get_output_embeddings()
    skipped = stored_quantisation(config).get("llm_int8_skip_modules") or []
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not any(f".{skip}." in f".{name}." for skip in skipped)
    ]
    layers = [layer for layer in linear if not layer.weight.requires_grad]  # the others are of the adapter
    before: int = DTYPE_BYTES[config.model.torch_dtype] * sum(layer.weight.numel() for layer in layers)
    return before - sum(_bytes(asked, layer.weight.numel(), layer.out_features) for layer in layers)


def _bytes(asked: QuantizationConfig, elements: int, num_rows: int) -> int:
    """Return the bytes of a matrix with its scales."""
    if asked.kind == "int8":
        return elements + 4 * num_rows
    blocks = -(-elements // _BLOCK)
    return elements // 2 + (blocks + 4 * -(-blocks // _SCALE_BLOCK) if asked.double_quant else 4 * blocks)


def _unmatched(patterns: list[str], names: Iterable[str]) -> list[tuple[int, str]]:
    names = list(names)
    return [(i, p) for i, p in enumerate(patterns) if not any(re.search(p, name) for name in names)]
