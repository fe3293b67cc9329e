"""Exports a committed checkpoint in GGUF, for llama.cpp and Ollama, and checks that it is the trained model; a task.

It goes by way of a Hugging Face export in float32, which is checked and then thrown away.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config import Config, with_model_dir
from dist_ft.errors import ModelError
from dist_ft.jobs.export import check_logits, finish, probe_of, write_checked
from dist_ft.jobs.spec import ExportResult
from dist_ft.model.base import dequantised, load_model, load_tokenizer, num_embedding_rows, skeleton
from dist_ft.model.gguf.gguf_adapter import write_adapter
from dist_ft.model.gguf.gguf_file import read_model, write_model
from dist_ft.model.gguf.modelfile import modelfile
from dist_ft.model.gguf.shapes import find_family
from dist_ft.model.gguf.vocabulary import check_tokenizer, end_tokens
from dist_ft.model.trained import trains_adapter
from dist_ft.run.place import open_run, published

_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
MODEL, ADAPTER, BASE, MODELFILE = "model.gguf", "adapter.gguf", "base.gguf", "Modelfile"


def run(
    config: Config,
    run_dir: str,
    checkpoint: str,
    to: str,
    merge: bool = False,
    dtype: str | None = None,
    base_name: str | None = None,
) -> dict[str, Any]:
    """Export a checkpoint in GGUF. The directory appears under its name after the check.

    It holds `model.gguf`, or `adapter.gguf` with `base.gguf`, a Modelfile and the card.

    Args:
        config: Config of the run.
        run_dir: Path or URL of the run.
        checkpoint: Manifest path relative to the run.
        to: Target directory or URL, which must not exist.
        merge: Fold the adapter into the base model.
        dtype: `f32`, `f16`, `bf16` or `q8_0`; default is that of training.
        base_name: Name of a base model that Ollama has, beside which an adapter needs no `base.gguf`.

    Returns:
        An `ExportResult` as JSON values.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ExportError: The reloaded model computes other logits than the trained model.
        ModelError: llama.cpp knows no such model, tokenizer or adapter.
    """
    is_adapter = trains_adapter(config) and not merge
    _check(config, is_adapter)
    out_dtype = dtype or _DTYPES[config.model.torch_dtype]
    place = open_run(run_dir)
    manifest = Manifest.decode(place.store.read(checkpoint))
    with published(to) as directory:
        with TemporaryDirectory(dir=directory, prefix="hf-") as scratch:
            plain = Path(scratch)
            difference = write_checked(config, place, manifest, plain, merge, "float32")
            if is_adapter:
                write_adapter(plain, skeleton(config).config, directory / ADAPTER, config.run.name)
                if base_name is None:
                    base = dequantised(load_model(config)).float()
                    write_model(base, plain, directory / BASE, out_dtype, config.model.name)
            else:
                model = load_model(with_model_dir(config, str(plain), "float32"))
                write_model(model, plain, directory / MODEL, out_dtype, config.run.name)
                reloaded = read_model(directory / MODEL, model.config)
                difference = max(
                    difference, check_logits(config, probe_of(config, place.store, manifest), reloaded, out_dtype)
                )
            source = f"./{MODEL}" if not is_adapter else base_name or f"./{BASE}"
            tokenizer = load_tokenizer(config)
            ends = dict.fromkeys([*end_tokens(plain), tokenizer.eos_token_id])
            stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in ends if number is not None]
            text = modelfile(source, f"./{ADAPTER}" if is_adapter else None, tokenizer, stops)
            (directory / MODELFILE).write_text(text, encoding="utf-8")
        finish(config, place, manifest, directory, merge, base_name)
    return asdict(ExportResult(to, difference))


def _check(config: Config, is_adapter: bool) -> None:
    """Check that llama.cpp knows such models, before anything is written.

    Raises:
        ModelError: It does not.
    """
    find_family(skeleton(config).config)
    described = json.loads(load_tokenizer(config).backend_tokenizer.to_str())
    check_tokenizer(described, num_embedding_rows(config))
    method = config.method
    if is_adapter and (method.use_dora or method.modules_to_save):
        raise ModelError(
            f"--format gguf: an adapter of llama.cpp has no place for method.use_dora={method.use_dora} or "
            f"method.modules_to_save={method.modules_to_save}; export with --merge"
        )
