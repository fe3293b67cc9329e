"""Writes a LoRA adapter as a GGUF file, which llama.cpp loads beside its base (`--lora`), and Ollama (`ADAPTER`)."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, Keys
from gguf.constants import MODEL_ARCH_NAMES
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import PreTrainedConfig

from dist_ft.errors import ModelError
from dist_ft.model.adapter import ADAPTER_WEIGHTS
from dist_ft.model.gguf.gguf_file import tensor_name, write_tensors
from dist_ft.model.gguf.shapes import changed_rows, find_family

_PREFIX = "base_model.model."


def write_adapter(directory: Path, config: PreTrainedConfig, path: Path, name: str) -> None:
    """Write an adapter as a GGUF file, in float32.

    Args:
        directory: The adapter as PEFT writes it.
        config: Config of the base model.
        path: File to write.
        name: Name of the adapter in the file.

    Raises:
        ModelError: It changes what an adapter of llama.cpp cannot.
    """
    family = find_family(config)
    settings = PeftConfig.from_pretrained(str(directory))
    if settings.use_dora or settings.alpha_pattern:
        raise _refused("use_dora" if settings.use_dora else "alpha_pattern")
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[family.arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(settings.lora_alpha))

    def renamed() -> Iterator[tuple[str, torch.Tensor]]:
        for key, tensor in load_file(directory / ADAPTER_WEIGHTS).items():
            module, mark, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
            if not mark or side not in ("A", "B") or module == "lm_head":
                raise _refused(f"{key} in {ADAPTER_WEIGHTS}")
            values = tensor.float()
            if side == "B":
                # llama.cpp scales by alpha / r; rsLoRA by alpha / √r.
                scaled = values * sqrt(values.shape[1]) if settings.use_rslora else values
                values = changed_rows(family, config, module, scaled)
            yield f"{tensor_name(family, config, f'{module}.weight')}.lora_{side.lower()}", values

    write_tensors(writer, dict(renamed()), GGMLQuantizationType.F32)


def _refused(what: str) -> ModelError:
    return ModelError(f"--format gguf: an adapter of llama.cpp has nothing like {what}; export with --merge")
