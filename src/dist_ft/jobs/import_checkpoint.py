"""Makes a run from a checkpoint of DeepSpeed or of the Hugging Face Trainer; `dist-ft train --resume` goes on from it.

It runs in a process of its own, because it opens files of other tools (see `checkpoint/foreign.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dist_ft.checkpoint.foreign import Piece, find_zero_files, read_counters, read_trainer_moments, read_zero
from dist_ft.checkpoint.lineage import take_attempt
from dist_ft.checkpoint.manifest import MANIFEST, Manifest, check_coverage, index_pieces, map_slices
from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.config import Config, dump_yaml, with_commit
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import build_order
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.layout import checkpoint_name, slices_name
from dist_ft.model.adapter import Model, export_names
from dist_ft.model.base import skeleton
from dist_ft.model.trained import select_trained, trains_adapter
from dist_ft.model.weights import WeightFiles
from dist_ft.run.run_inputs import RunInputs
from dist_ft.run.state import RunRecord
from dist_ft.slices import Cursor, Environment, ParamInfo, SliceKey, WrittenFile
from dist_ft.storage.publish import new_directory, write_json, write_whole
from dist_ft.storage.store import LocalStore
from dist_ft.storage.urls import is_url
from dist_ft.zero.optimizers import optimizer_of


def run(config: Config, inputs: dict[str, Any], source: str) -> dict[str, Any]:
    """Write a run directory with one committed checkpoint.

    Args:
        config: Config of the new run, which must not exist.
        inputs: A `RunInputs` as JSON values.
        source: The checkpoint, a directory of this machine.

    Returns:
        `run_dir`, the `step`, and `notes` for people.

    Raises:
        UsageError: The directory is no checkpoint that is read, or the config is of another run.
        CheckpointError: A file is damaged, of another model, or asks for what is not read from a pickle.
    """
    prepared = RunInputs.from_dict(inputs)
    config = with_commit(config, prepared.commit)
    if optimizer_of(config.optimizer).fingerprint != "adamw":
        raise UsageError("only the state of AdamW can be taken over; remove optimizer.kind from the config")
    if is_url(config.run.address):
        raise UsageError(
            f"run.output_dir={config.run.output_dir} is no directory of this machine; import into one and copy the run"
        )
    model = select_trained(skeleton(config), config)
    params = _params(model)
    found = _open(Path(source), config, model, params)
    cursor = _cursor(config, prepared, found)
    with new_directory(Path(config.run.address)) as directory:
        store = LocalStore(directory)
        attempt = take_attempt(store, None).number
        files = _write(store, f"checkpoints/{checkpoint_name(found.step, attempt)}", found, params)
        slices = map_slices(store, f"checkpoints/{checkpoint_name(found.step, attempt)}", [file.name for file in files])
        check_coverage(params, slices)
        manifest = Manifest(
            run_id=config.run.name, attempt=attempt, step=found.step, cursor=cursor, world_size=len(files),
            zero_stage=config.zero_stage, optimizer_step=found.optimizer_step, fingerprint=prepared.fingerprint,
            params=params, groups=(), schedule={**config.schedule.model_dump(), "max_steps": prepared.max_steps},
            files=files, probe=None, environment=Environment({}, 0, 0, "", found.name), wandb_id=None,
            pieces=index_pieces(slices, files),
        )  # fmt: skip
        record = RunRecord(config.run.name, "stopped", attempt, found.step, prepared.max_steps)
        write_whole(directory / "config.yaml", dump_yaml(config))
        write_json(directory / "run.json", asdict(record))
        store.create_exclusive(f"{manifest.directory}/{MANIFEST}", manifest.encode())
    return {"run_dir": config.run.address, "step": found.step, "notes": [found.name, *_notes(found, cursor, prepared)]}


@dataclass(frozen=True)
class _Found:
    """A checkpoint of another tool.

    Attributes:
        name: What it is, for people.
        step: Completed optimizer steps.
        optimizer_step: Updates that the optimizer has made.
        num_samples: Sequences that were used; None if it does not say so.
        num_parts: Files that become slices, one after the other.
        parts: Their state.
        weights_dtype: Dtype of the weights; None for float32 masters.
    """

    name: str
    step: int
    optimizer_step: int
    num_samples: int | None
    num_parts: int
    parts: Iterable[list[Piece]]
    weights_dtype: str | None = None


def _params(model: Model) -> tuple[ParamInfo, ...]:
    exported = export_names(model)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return tuple(ParamInfo(name, shape, exported[name]) for name, shape in trained.items())


def _open(source: Path, config: Config, model: Model, params: Sequence[ParamInfo]) -> _Found:
    """Find out what a directory holds."""
    zero = find_zero_files(source)
    if zero is not None:
        counters = read_counters(zero)
        kind = "ZeRO 3" if zero.is_stage3 else "ZeRO 1 or 2"
        name = f"checkpoint of DeepSpeed, {kind}, {len(zero.optimizer_files)} rank(s)"
        return _Found(
            name,
            counters.step,
            counters.optimizer_step,
            counters.num_samples,
            len(zero.optimizer_files),
            read_zero(zero),
        )
    state, moments = source / "trainer_state.json", source / "optimizer.pt"
    if not state.is_file() or not moments.is_file():
        raise UsageError(
            f"{source} is no checkpoint that can be taken over: it has neither *zero_pp_rank_*_optim_states.pt of "
            "DeepSpeed, itself or in the folder that `latest` names, nor trainer_state.json and optimizer.pt of the "
            "Hugging Face Trainer"
        )
    weights, dtype = _trainer_weights(source, config, model, params)
    step = int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    parts = [[*weights, *read_trainer_moments(moments, params)]]
    return _Found("checkpoint of the Hugging Face Trainer", step, step, None, 1, parts, dtype)


def _trainer_weights(
    source: Path, config: Config, model: Model, params: Sequence[ParamInfo]
) -> tuple[list[Piece], str | None]:
    """Return the weights that the Trainer has saved, and their dtype if it is not float32."""
    pieces: list[Piece] = []
    dtypes = set()
    if trains_adapter(config):
        path = source / "adapter_model.safetensors"
        if not path.is_file():
            raise UsageError(f"{source} has no adapter_model.safetensors, and the config trains an adapter")
        with safe_open(str(path), framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    else:
        files = WeightFiles(source, model)
        if not files.has_all:
            raise UsageError(f"{source} has no safetensors with all parameters of model.name={config.model.name}")
        stored = {param.export_name: files.read(param.name, 0, param.numel).view(param.shape) for param in params}
    for param in params:
        tensor = stored.get(param.export_name)
        if tensor is None or tuple(tensor.shape) != param.shape:
            found = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
            raise CheckpointError(f"{source} has {found} for {param.export_name}, expected shape {list(param.shape)}")
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        pieces.append((SliceKey(param.name, 0, "fp32"), tensor.reshape(-1)))
    return pieces, None if dtypes == {"float32"} else ", ".join(sorted(dtypes))


def _write(store: LocalStore, directory: str, found: _Found, params: Sequence[ParamInfo]) -> tuple[WrittenFile, ...]:
    """Write the parts as slices.

    Raises:
        CheckpointError: A part is of a parameter that the config does not train.
    """
    known = {param.name for param in params}
    files = []
    for number, pieces in enumerate(found.parts):
        if others := [key.param for key, _ in pieces if key.param not in known]:
            raise CheckpointError(
                f"the checkpoint trains {others[0]}, and the config does not: it trains {len(known)} parameters such "
                f"as {params[0].name}; compare model.name and the section method"
            )
        files.append(write_slices(store, f"{directory}/{slices_name(number, found.num_parts)}", pieces))
    return tuple(files)


def _cursor(config: Config, inputs: RunInputs, found: _Found) -> Cursor:
    """Return where the data goes on.

    Raises:
        UsageError: The config is of a run of another batch, or of one that ends before.
    """
    batch = config.train.global_batch_size
    if found.num_samples is not None and found.num_samples != found.step * batch:
        raise UsageError(
            f"the checkpoint used {found.num_samples} sequences in {found.step} steps, and "
            f"train.global_batch_size={batch}; set it to {found.num_samples / max(1, found.step):g}"
        )
    if not 0 < found.step < inputs.max_steps:
        raise UsageError(
            f"the checkpoint is of step {found.step}, and the run of the config has {inputs.max_steps} steps; raise "
            "train.max_steps or train.epochs"
        )
    shards = [open_split(split, config.data.loader) for split in inputs.splits]
    position = min(found.step * batch, inputs.num_positions)
    return Cursor(build_order(shards, config.data, config.run.seed).epoch(position), position)


def _notes(found: _Found, cursor: Cursor, inputs: RunInputs) -> list[str]:
    """Say what of the checkpoint is not as it was."""
    notes = [
        f"the data goes on at sequence {cursor.position}, in epoch {cursor.epoch}: the order of the sequences is the "
        "one of run.seed, so in this epoch some come a second time and others not at all; later ones have each once",
        f"the learning rate follows the config's schedule from step {found.step} of {inputs.max_steps} on",
    ]
    if found.weights_dtype is not None:
        notes.append(f"the weights were kept in {found.weights_dtype}; the float32 masters begin as these")
    return notes
