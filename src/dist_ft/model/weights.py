"""The base model's safetensors files, read by range: nobody needs the whole model to fill a part of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class WeightFiles:
    """Finds every parameter of a model in the files of a directory.

    Attributes:
        has_all: Whether each one is there under its own name, with its shape. If not, the family renames or
            rearranges weights when transformers loads them, and only `from_pretrained` knows how.
    """

    def __init__(self, directory: Path, model: Any) -> None:
        opened: list[Any] = [
            safe_open(str(directory / name), framework="pt") for name in _read_by_transformers(directory)
        ]
        stored: dict[str, Any] = {key: file for file in opened for key in file.keys()}  # noqa: SIM118, it is no dict
        self._found: dict[str, tuple[Any, str]] = {}
        self.has_all = not hasattr(model.config, "quantization_config")
        for names, shape in _tensors(model):
            keys = {k for name in names for k in _spellings(name, model.base_model_prefix) if k in stored}
            # Of tied names that are all stored, transformers decides by their values whether they are tied.
            if len(keys) != 1 or not _is_plain(stored[key := keys.pop()].get_slice(key), shape):
                self.has_all = False
                return
            self._found |= dict.fromkeys(names, (stored[key], key))

    def read(self, name: str, start: int, count: int) -> torch.Tensor:
        """Returns elements [count] of the flattened parameter, in the dtype of the file."""
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


def _read_by_transformers(directory: Path) -> list[str]:
    """One whole file, or those that the index names; whatever else lies there is not the model."""
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else []
    return [name for name in names if (directory / name).is_file()]


def _is_plain(stored: Any, shape: tuple[int, ...]) -> bool:
    return tuple(stored.get_shape()) == shape and stored.get_dtype() in ("F32", "BF16", "F16") and 0 not in shape


def _tensors(model: Any) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Yields the names and the shape of each parameter and persistent buffer; tied ones have several names."""
    by_tensor: dict[int, tuple[list[str], tuple[int, ...]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names, _ = by_tensor.setdefault(id(tensor), ([], tuple(tensor.shape)))
        names.append(name)
    yield from by_tensor.values()


def _spellings(name: str, prefix: str) -> list[str]:
    """A checkpoint of the bare backbone lacks its prefix, and one of the whole model has it."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
