"""Reads the base model's safetensors files by range, so that no process needs the whole model to fill a part of it."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from dist_ft.model.intact import weight_file_names

_DTYPES = ("F32", "BF16", "F16")


class WeightFiles:
    """Finds every parameter of a model in the files of a directory.

    Attributes:
        has_all: Whether each parameter is there under its own name, with its shape. If not, the family renames or
            rearranges weights when transformers loads them, and only `from_pretrained` knows how.
    """

    def __init__(self, directory: Path, model: PreTrainedModel) -> None:
        names = [name for name in weight_file_names(directory) if (directory / name).is_file()]
        opened: list[Any] = [safe_open(str(directory / name), framework="pt") for name in names]
        stored = {key: file for file in opened for key in file.keys()}  # noqa: SIM118, it is no dict
        self._found: dict[str, tuple[Any, str]] = {}
        self.has_all = not hasattr(model.config, "quantization_config")
        # Names and shape of each parameter and persistent buffer; tied ones have several names.
        tensors: dict[int, tuple[list[str], tuple[int, ...]]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensors.setdefault(id(tensor), ([], tuple(tensor.shape)))[0].append(name)
        prefix = f"{model.base_model_prefix}."
        for names, shape in tensors.values():
            # A checkpoint of the bare backbone lacks its prefix, and one of the whole model has it.
            spellings = {spelling for name in names for spelling in (name, name.removeprefix(prefix), prefix + name)}
            keys = spellings & stored.keys()
            # Of tied names that are all stored, transformers decides by their values whether they are tied.
            if len(keys) != 1:
                self.has_all = False
                return
            file = stored[key := keys.pop()]
            part = file.get_slice(key)
            if tuple(part.get_shape()) != shape or part.get_dtype() not in _DTYPES or 0 in shape:
                self.has_all = False
                return
            self._found |= dict.fromkeys(names, (file, key))

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return elements [count] of the flattened parameter, in the dtype of the file."""
        file, key = self._found[name]
        part = file.get_slice(key)
        shape = part.get_shape()
        if not shape:
            whole: torch.Tensor = file.get_tensor(key).reshape(1)
            return whole[start : start + count]
        row = prod(shape[1:])
        first, last = start // row, -(-(start + count) // row)
        found: torch.Tensor = part[first:last].reshape(-1)[start - first * row :][:count]
        return found
