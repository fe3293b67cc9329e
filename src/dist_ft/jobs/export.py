"""Exports a committed checkpoint as a plain Hugging Face directory, and checks that it is the trained model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_ft.checkpoint.consolidate import ReadFrozen, consolidate
from dist_ft.checkpoint.holds import reading
from dist_ft.checkpoint.manifest import Manifest, verify_files
from dist_ft.checkpoint.snapshot import SliceReader
from dist_ft.config import Config, with_model_dir
from dist_ft.errors import ExportError
from dist_ft.evaluate.held_out import probe_inputs
from dist_ft.jobs.spec import ExportResult
from dist_ft.machine import available_memory_bytes
from dist_ft.model.adapter import Model, export_names, load_adapter, save_adapter_config
from dist_ft.model.base import dequantised, load_model, model_dir, quantisation_of, skeleton
from dist_ft.model.card import model_card
from dist_ft.model.exported import save_merged, save_model_config, save_texts, untie
from dist_ft.model.trained import select_trained, trains_adapter
from dist_ft.model.weights import WeightFiles
from dist_ft.printable import format_bytes
from dist_ft.run.log import read_evals, read_steps
from dist_ft.run.place import Run, open_run, published
from dist_ft.slices import ParamInfo, Probe, SliceKey
from dist_ft.storage.store import Store

_MAX_SHARD_BYTES = 5 << 30
_NICENESS = 10
_MEMORY_MARGIN = 1.3
"""Times the bytes of the weights: the model that is loaded, a file of it, and the logits of the probe."""
_RELATIVE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "f32": 1e-4, "f16": 5e-3, "bf16": 5e-2, "q8_0": 1e-1}
"""Largest allowed probe difference, relative to the largest logit. Kernels and batch shapes may differ, weights not."""


def run(
    config: Config,
    run_dir: str,
    checkpoint: str,
    to: str,
    merge: bool = False,
    dtype: str | None = None,
    base_name: str | None = None,
    is_beside_training: bool = False,
) -> dict[str, Any]:
    """Export a checkpoint. The directory appears under its name after the check.

    Args:
        config: Config of the run.
        run_dir: Path or URL of the run.
        checkpoint: Manifest path relative to the run.
        to: Target directory or URL, which must not exist.
        merge: Fold the adapter into the base model.
        dtype: Dtype of the files; default is `model.dtype`.
        base_name: Name of the base model in an adapter; default is `model.name`.
        is_beside_training: Take `export.num_threads` only, at a low priority, and nothing if the memory is short.

    Returns:
        An `ExportResult` as JSON values.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ExportError: The reloaded model computes other logits than the trained model, or beside training there is too
            little memory.
    """
    if is_beside_training:
        os.nice(_NICENESS)
        torch.set_num_threads(config.export.num_threads)
        _check_memory(config, 4 if merge else getattr(torch, dtype or config.model.torch_dtype).itemsize)
    place = open_run(run_dir)
    manifest = Manifest.decode(place.store.read(checkpoint))
    with published(to) as directory:
        difference = write_checked(config, place, manifest, directory, merge, dtype, base_name)
        finish(config, place, manifest, directory, merge, base_name)
    return asdict(ExportResult(to, difference))


def write_checked(
    config: Config,
    place: Run,
    manifest: Manifest,
    directory: Path,
    merge: bool = False,
    dtype: str | None = None,
    base_name: str | None = None,
) -> float:
    """Write a checkpoint as a Hugging Face directory, without a card, and check it.

    Args:
        config: Config of the run.
        place: The run.
        manifest: The checkpoint.
        directory: An empty directory.
        merge: Fold the adapter into the base model.
        dtype: Dtype of the files; default is `model.dtype`.
        base_name: Name of the base model in an adapter; default is `model.name`.

    Returns:
        Largest difference of the probe's logits, relative to the largest logit.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ExportError: The reloaded model computes other logits than the trained model.
    """
    out_dtype = dtype or config.model.torch_dtype
    is_merged = merge and trains_adapter(config)
    # An adapter that will be merged stays in float32 until the sum is rounded.
    first_dtype = "float32" if is_merged else out_dtype
    with reading(place.store, manifest.directory):
        verify_files(place.store, manifest)
        probe = probe_of(config, place.store, manifest)
        _write_weights(config, place.store, manifest, directory, first_dtype, base_name)
    difference = check_logits(config, probe, _reload(config, directory, first_dtype), first_dtype)
    if is_merged:
        # Merged in float32, then cast once.
        base = dequantised(load_model(config)).float()
        untie(base)
        model = load_adapter(base, directory).merge_and_unload()
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (directory / name).unlink()
        save_merged(model.to(getattr(torch, out_dtype)), config, directory)
        merged = check_logits(config, probe, _reload(config, directory, out_dtype), out_dtype)
        difference = max(difference, merged)
    save_texts(config, directory)
    return difference


def finish(
    config: Config, place: Run, manifest: Manifest, directory: Path, merge: bool, base_name: str | None = None
) -> None:
    """Write the card of an export, and let everybody read its files."""
    place.fetch("metrics.jsonl", "eval.jsonl")
    last_row = read_steps(place.metrics).get(manifest.step)
    held_out = {step: row.metrics for step, row in read_evals(place.evals).items()}
    loss = last_row.loss if last_row else None
    card = model_card(config, manifest.step, manifest.environment.versions, loss, held_out, merge, base_name)
    (directory / "README.md").write_text(card, encoding="utf-8")
    for file in directory.iterdir():
        file.chmod(0o644)  # save_pretrained makes weights readable for their owner only


def _check_memory(config: Config, bytes_per_parameter: int) -> None:
    """Refuse to load the model for its check where the ranks may need the memory."""
    num_parameters = sum(parameter.numel() for parameter in skeleton(config).parameters())
    needed, free = int(num_parameters * bytes_per_parameter * _MEMORY_MARGIN), available_memory_bytes()
    if free is not None and needed > free:
        raise ExportError(
            f"the model takes about {format_bytes(needed)} to be checked, and {format_bytes(free)} is free beside "
            "training; export it later with `dist-ft export`, or set export.dtype=bfloat16"
        )


def _write_weights(
    config: Config, store: Store, manifest: Manifest, directory: Path, dtype: str, base_name: str | None
) -> None:
    """Write weights and the config that names them. The names are checked against the model's structure."""
    model = select_trained(skeleton(config), config)
    is_adapter = trains_adapter(config)
    expected = {(key, tuple(model.get_parameter(name).shape)) for name, key in export_names(model).items()}
    found = {(param.export_name, param.shape) for param in manifest.params}
    if expected != found:
        odd = sorted(expected ^ found)[0]
        raise ExportError(f"the checkpoint's tensors are not the model's: {odd[0]} {list(odd[1])} is on one side only")
    stem = "adapter_model" if is_adapter else "model"
    # PEFT reads an adapter from one file.
    limit = sys.maxsize if is_adapter else _MAX_SHARD_BYTES
    frozen, read_frozen = ([], None) if is_adapter else _frozen(config, model)
    consolidate(
        store,
        manifest,
        directory,
        stem=stem,
        dtype=dtype,
        max_shard_bytes=limit,
        frozen=frozen,
        read_frozen=read_frozen,
    )
    if is_adapter:
        save_adapter_config(model, config, directory, base_name)
    else:
        save_model_config(config, type(model).__name__, dtype, directory)


def _frozen(config: Config, model: Any) -> tuple[list[ParamInfo], ReadFrozen]:
    """Return the tensors that are not trained (`method.freeze`, persistent buffers), and a reader of them."""
    names = {name: tuple(p.shape) for name, p in model.named_parameters() if not p.requires_grad}
    persistent = model.state_dict(keep_vars=True)
    names |= {name: tuple(b.shape) for name, b in model.named_buffers() if name in persistent and b.is_floating_point()}
    files = WeightFiles(model_dir(config), model)
    loaded = {} if files.has_all or not names else dict(load_model(config).state_dict())
    trained_in = getattr(torch, config.model.torch_dtype)

    def read(name: str, start: int, count: int) -> npt.NDArray[np.float32]:
        part = loaded[name].detach().reshape(-1)[start : start + count] if loaded else files.read(name, start, count)
        # In the dtype of training: a bfloat16 run has rounded the values of float32 files.
        values: npt.NDArray[np.float32] = part.to(trained_in).float().numpy()
        return values

    return [ParamInfo(name, shape, name) for name, shape in names.items()], read


def _reload(config: Config, directory: Path, dtype: str) -> Model:
    """Load what a directory holds: a model, or an adapter on the base."""
    if (directory / "adapter_config.json").is_file():
        return load_adapter(load_model(config), directory)
    return load_model(with_model_dir(config, str(directory), dtype))


def probe_of(config: Config, store: Store, manifest: Manifest) -> Probe:
    """Return the logits of the trained model; those of a checkpoint without any are those of its slices."""
    return manifest.probe or probe_slices(config, store, manifest)


def probe_slices(config: Config, store: Store, manifest: Manifest) -> Probe:
    """Return the probe's logits of the model that a resume would load: the base, and the slices on top of it."""
    model = select_trained(load_model(config), config).eval()
    read, share = SliceReader(store, manifest), manifest.optimizer_numbers.get("average_share")
    with torch.no_grad():
        for param in manifest.params:
            weights = read(SliceKey(param.name, 0, "fp32"), param.numel)
            if share is not None:  # see `zero/schedule_free.py`
                weights += (1 - 1 / share) * (read(SliceKey(param.name, 0, "z"), param.numel) - weights)
            model.get_parameter(param.name).copy_(weights.view(param.shape))
    tokens, columns = probe_inputs(model.get_input_embeddings().weight.shape[0])
    logits = _logits(model, tokens, columns)
    return Probe(tuple(tokens), tuple(columns), tuple(map(tuple, logits.tolist())))


def _logits(model: Model, tokens: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
    """Return the logits [tokens, columns] in float32."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([[*tokens]]), use_cache=False).logits[0][:, [*columns]]
    return found.float()


def check_logits(config: Config, probe: Probe, model: Model, dtype: str) -> float:
    """Compare a reloaded model's probe logits with the trained model's; return the largest difference.

    Args:
        config: Config of the run.
        probe: Logits of the trained model.
        model: The reloaded model.
        dtype: Dtype of its files, a key of the table of tolerances.

    Raises:
        ExportError: They differ by more than that dtype explains.
    """
    logits = _logits(model.eval(), probe.tokens, probe.columns)
    trained = torch.tensor(probe.logits)
    difference = float((logits - trained).abs().max() / trained.abs().max().clamp_min(1e-6))
    # An int8 base rounds what goes into a layer, too, which a merged model does not.
    quantised = quantisation_of(config)
    is_rounded = quantised is not None and quantised.kind == "int8"
    dtypes = {dtype, config.model.torch_dtype, "bfloat16" if is_rounded else "float32"}
    coarsest = max(dtypes, key=_RELATIVE_TOLERANCE.__getitem__)
    if not difference <= _RELATIVE_TOLERANCE[coarsest]:
        raise ExportError(
            f"the exported model computes other logits than the trained one: relative difference {difference:.2e}, "
            f"allowed {_RELATIVE_TOLERANCE[coarsest]:.0e} in {coarsest}; the export was discarded"
        )
    return difference
