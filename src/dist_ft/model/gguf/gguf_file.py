"""Writes a model as a GGUF file, a tensor at a time, and reads it back through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quantize,
)
from gguf.constants import MODEL_ARCH_NAMES
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from dist_ft.errors import ExportError
from dist_ft.model.gguf.shapes import Family, add_hyperparameters, changed_rows, find_family, rope_divisors
from dist_ft.model.gguf.vocabulary import add_vocabulary

Floats = npt.NDArray[np.float32]
DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def write_model(model: PreTrainedModel, texts: Path, path: Path, dtype: str, name: str) -> None:
    """Write a model as a GGUF file.

    Args:
        model: In float32, on the CPU.
        texts: Directory of its tokenizer and generation config.
        path: File to write.
        dtype: Of matrices: `f32`, `f16`, `bf16` or `q8_0`. Vectors stay in float32, as llama.cpp wants them.
        name: Name of the model in the file.

    Raises:
        ExportError: A value is too large for float16.
        ModelError: See `find_family` and `add_vocabulary`.
    """
    kind, file_type = DTYPES[dtype]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[find_family(model.config).arch])
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_hyperparameters(writer, model.config)
    add_vocabulary(writer, texts, model.config.vocab_size)
    write_tensors(writer, _tensors(model), kind)


def write_tensors(writer: GGUFWriter, tensors: dict[str, torch.Tensor], kind: GGMLQuantizationType) -> None:
    """Write header, fields and tensors, of which one at a time is in memory in its new type, and close the file."""
    kinds = {name: _kind(tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block, num_bytes = GGML_QUANT_SIZES[kinds[name]]
        size = tensor.numel() // block * num_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_encoded(name, tensor, kinds[name]))
    finally:
        writer.close()


def read_model(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Load a GGUF file through transformers, in float32.

    Args:
        path: The file.
        config: Config of the model. transformers' reader does not take over all of it: not the heads of Qwen 3, say.
    """
    if config.model_type == "mistral":  # the reader knows it only as what it is in the file
        shared = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
        config = LlamaConfig(**{key: value for key, value in config.to_dict().items() if key in shared})
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )
    return found


def tensor_name(family: Family, config: PreTrainedConfig, name: str) -> str:
    """Return llama.cpp's name of a weight or bias.

    Raises:
        ExportError: llama.cpp has no such tensor in this family.
    """
    names = get_tensor_name_map(family.arch, config.num_hidden_layers)
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ExportError(f"--format gguf: llama.cpp has no place for {name} in a {config.model_type} model")
    return found


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors under llama.cpp's names."""
    return dict(_renamed(model, find_family(model.config)))


def _renamed(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding when there is no output.weight
        module = name.rpartition(".")[0]
        yield tensor_name(family, config, name), changed_rows(family, config, module, tensor.detach())
    if (divisors := rope_divisors(config)) is not None:
        yield "rope_freqs.weight", divisors


def _kind(tensor: torch.Tensor, kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type of a tensor in the file: vectors are never rounded, and short rows have no blocks of 32."""
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def _encoded(name: str, tensor: torch.Tensor, kind: GGMLQuantizationType) -> npt.NDArray[np.generic]:
    values: Floats = tensor.float().contiguous().numpy()
    with np.errstate(over="ignore"):
        encoded: npt.NDArray[np.generic] = quantize(values, kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(encoded).all():
        raise ExportError(f"{name} has values that float16 cannot hold; use --dtype bf16")
    return encoded
