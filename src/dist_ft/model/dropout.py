"""Dropout and noise that depend on (seed, step, slot, module) only.

`nn.Dropout` draws one mask for a batch from a global generator. Another micro batch, world size or a recomputed layer
changes that mask. Here every row has its own counter-based mask, so a sequence is dropped in the same way wherever and
however often it is computed.

Shapes: B rows of a micro batch, then any others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dist_ft.errors import ModelError

_OTHER_HEADS = ("classifier_", "summary_")  # settings of heads that a causal language model does not build

_NOISE = -1
"""In place of a module's number, for the noise of the embeddings."""


@dataclass
class DropoutKeys:
    """Identifies the current micro batch; set before its forward pass and kept until its backward pass is done.

    Attributes:
        seed: `run.seed`.
        step: Optimizer step, counted from 0.
        slots: [B], slot of each row.
        lengths: [B], tokens of each row without padding.
    """

    seed: int
    step: int = 0
    slots: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    lengths: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class SequenceDropout(nn.Module):
    """Replaces `nn.Dropout`, with one counter-based mask for each row."""

    def __init__(self, p: float, index: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p = p
        self._index = index
        self._keys = keys

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of `x` [B, ...] and scale the rest by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        # bits are uniform over int32, so P(bits >= threshold) = 1 - p.
        keep = _bits(x, self._keys, self._index) >= int(self.p * 2**32) - 2**31
        return x * keep * (1 / (1 - self.p))


def install_embedding_noise(model: nn.Module, alpha: float, keys: DropoutKeys) -> None:
    """Add noise to the model's embeddings while it is trained (NEFTune, Jain et al. 2023).

    Args:
        model: The model, adapter attached.
        alpha: `method.neftune_alpha`.
        keys: Those of the model's dropout.
    """

    def add_noise(module: nn.Module, _: tuple[torch.Tensor, ...], x_BTH: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return x_BTH
        noise_BTH = _bits(x_BTH, keys, _NOISE).float() / 2**31
        sizes_B = alpha / (keys.lengths.to(x_BTH.device).clamp_min(1) * x_BTH.shape[-1]).sqrt()
        return x_BTH + (noise_BTH * sizes_B[:, None, None]).to(x_BTH.dtype)

    model.get_input_embeddings().register_forward_hook(add_noise)


def _bits(x: torch.Tensor, keys: DropoutKeys, index: int) -> torch.Tensor:
    """Return random int32 of the shape of `x` [B, ...]: the same for a sequence wherever it is computed.

    Raises:
        ModelError: Rows are not sequences.
    """
    slots = keys.slots.to(x.device)
    if x.shape[0] != slots.shape[0]:
        raise ModelError(f"dropout got {x.shape[0]} rows for {slots.shape[0]} sequences; this model mixes rows")
    keys_B = _hash32(slots.int() ^ _fold(keys.seed, keys.step, index))
    places = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
    return _hash32(places[None, :] ^ keys_B[:, None]).view_as(x)


def check_dropout(model: nn.Module) -> None:
    """Refuses dropout inside an attention kernel or called as a function: it is not an `nn.Dropout` module.

    Raises:
        ModelError: The model's config asks for such dropout.
    """
    config = getattr(model, "config", None)
    replaceable = {module.p for module in model.modules() if type(module) is nn.Dropout}
    for name, value in (config.to_dict() if config is not None else {}).items():
        if "drop" not in name or not isinstance(value, float) or value == 0:
            continue
        if name.startswith(_OTHER_HEADS):
            continue
        if name.startswith("att") or value not in replaceable:
            raise ModelError(
                f"the model has {name}={value}, and that dropout cannot be made independent of the batch layout. "
                f"Set model.config_overrides={{{name}: 0.0}}"
            )


def install_sequence_dropout(model: nn.Module, seed: int) -> DropoutKeys:
    """Replace every `nn.Dropout` of base and adapter, numbered in module order.

    Raises:
        ModelError: The model draws attention dropout.
    """
    check_dropout(model)
    keys = DropoutKeys(seed)
    targets = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]  # fmt: skip
    for index, (parent, name) in enumerate(targets):
        old = parent.get_submodule(name)
        assert isinstance(old, nn.Dropout)
        # PEFT keeps its dropouts in a ModuleDict, which takes items, not attributes.
        replacement = SequenceDropout(old.p, index, keys)
        if isinstance(parent, nn.ModuleDict):
            parent[name] = replacement
        else:
            setattr(parent, name, replacement)
    return keys


def _fold(*values: int) -> int:
    """Hashes Python integers to one int32."""
    state = 0x9E3779B9
    for value in values:
        for part in (value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF):
            state = (state ^ part) * 0x85EBCA6B & 0xFFFFFFFF
            state ^= state >> 13
            state = state * 0xC2B2AE35 & 0xFFFFFFFF
            state ^= state >> 16
    return state - 2**32 if state >= 2**31 else state


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """Compute the `lowbias32` integer hash (Wellons 2018) on int32; the masks make the shifts logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -2073254261  # 0x846CA68B as int32
    return x ^ ((x >> 16) & 0xFFFF)
