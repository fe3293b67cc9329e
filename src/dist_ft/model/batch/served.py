"""A base model and adapters of it that answer together: each row of a batch with its own adapter, or with none.

Legend: R rows, T new tokens, W places of the cache, V tokens of the vocabulary.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedConfig

from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.model.adapter import load_adapter, load_another, without_harmless_warnings
from dist_ft.model.base import load_model
from dist_ft.model.batch.rows_cache import RowsCache

_NO_ADAPTER = "__base__"  # PEFT's name


class ServedModel:
    """A model ready to answer.

    Args:
        config: Names the base model and its dtype.
        merged: Directory of an adapter to fold in.

    Raises:
        ModelError: It does not load.
    """

    def __init__(self, config: Config, merged: Path | None = None) -> None:
        model = load_model(config)
        if merged is not None:
            model = load_adapter(model.float(), merged).merge_and_unload()
            model = model.to(getattr(torch, config.model.torch_dtype))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._base = model.to(device).requires_grad_(False).eval()
        self._adapted: PeftModel | None = None
        self._names: dict[str, str] = {}  # directory → PEFT's name, which may not hold dots
        self._num_loaded = 0
        accepted = inspect.signature(self._base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @property
    def config(self) -> PreTrainedConfig:
        """Config of the base model."""
        return self._base.config

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._base.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, keys and values."""
        return self._base.dtype

    @property
    def adapters(self) -> tuple[str, ...]:
        """Directories of the adapters that are loaded."""
        return tuple(self._names)

    def load(self, directory: str) -> None:
        """Load an adapter.

        Raises:
            ModelError: It is no adapter of this model, or one that cannot be mixed with others.
        """
        check_mixable(Path(directory))
        name = f"a{self._num_loaded}"
        self._num_loaded += 1
        try:
            if self._adapted is None:
                self._adapted = load_adapter(self._base, Path(directory), name).eval()
            else:
                load_another(self._adapted, Path(directory), name)
        except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
            raise ModelError(f"{directory} does not load as an adapter of the base model: {error}") from error
        self._adapted.requires_grad_(False).eval()
        self._names[directory] = name

    def unload(self, directory: str) -> None:
        """Forget an adapter."""
        assert self._adapted is not None
        name = self._names.pop(directory)
        if self._names:
            with without_harmless_warnings():
                self._adapted.delete_adapter(name)
        else:
            self._base = self._adapted.unload()
            self._adapted = None

    @torch.no_grad()
    def __call__(
        self, input_ids_RT: torch.Tensor, mask_RW: torch.Tensor, cache: RowsCache, adapters: Sequence[str | None]
    ) -> torch.Tensor:
        """Return the logits behind the last token of each row, in float32; the cache gets the new places.

        Args:
            input_ids_RT: New tokens.
            mask_RW: 1 for a token, 0 for padding, the new ones included.
            cache: Places before them.
            adapters: Directory a row, loaded before; None for the base model.
        """
        more = dict(self._last_only)
        if self._takes_positions:
            more["position_ids"] = (mask_RW.cumsum(-1) - 1).clamp(min=0)[:, -input_ids_RT.shape[1] :]
        if self._adapted is not None:
            more["adapter_names"] = [_NO_ADAPTER if a is None else self._names[a] for a in adapters]
        model = self._adapted or self._base
        found = model(input_ids=input_ids_RT, attention_mask=mask_RW, past_key_values=cache, use_cache=True, **more)
        return found.logits[:, -1].float()


def check_mixable(directory: Path) -> None:
    """Check from its files alone that an adapter can share a batch with others.

    Raises:
        ModelError: It cannot.
    """
    try:
        settings = json.loads((directory / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory} has no adapter_config.json that can be read: {error}") from error
    if settings.get("peft_type") != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else settings.get("peft_type")
        raise ModelError(f"{directory} is an adapter of kind {kind}, which cannot be mixed with others; merge it")
