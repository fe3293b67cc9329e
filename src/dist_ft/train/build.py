"""Builds one rank: model, adapter, dropout, engine, loader. Only here do these packages meet."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod

import torch
from torch import nn

from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.snapshot import SliceReader
from dist_ft.config import Config
from dist_ft.data.shards.split import PreparedSplit
from dist_ft.data.stream.cache import open_split
from dist_ft.data.stream.loader import RankLayout, TrainLoader, build_order, fitting_batch
from dist_ft.memory import ModelShape
from dist_ft.model.adapter import export_names
from dist_ft.model.base import load_model, model_dir, quantisation_of, skeleton
from dist_ft.model.dropout import DropoutKeys, install_embedding_noise, install_sequence_dropout
from dist_ft.model.trained import model_shape, select_trained
from dist_ft.model.weights import WeightFiles
from dist_ft.objectives.kinds import build_objective
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Objective
from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
from dist_ft.slices import Environment, Fingerprint, ParamInfo
from dist_ft.storage.objects import open_store
from dist_ft.train.device_memory import all_agree_on_least, device_memory_bytes
from dist_ft.train.mfu import flops_per_token, peak_flops
from dist_ft.zero.engine import Engine, build_engine
from dist_ft.zero.optimizers import optimizer_of
from dist_ft.zero.partitions import restore_slices
from dist_ft.zero.sharding import full_shape, shard_model

logger = logging.getLogger(__name__)

_PACKAGES = ("dist-ft", "torch", "deepspeed", "transformers", "peft", "ray")


@dataclass
class RankParts:
    """Everything that the loop of one rank works with.

    Attributes:
        config: The run config.
        spec: Instructions to the rank.
        objective: What is optimised.
        engine: The engine around `ObjectiveModule`.
        params: The trained parameters as every process sees them.
        dropout_keys: Keys to set before each micro batch.
        loader: Steps of the run.
        layout: This rank's part of a batch.
        eval_sets: See `RunInputs.measured_sets`.
        vocab_size: Rows of the embedding.
        start_step: Completed steps at the start of this attempt.
        fingerprint: Identifies the run that checkpoints belong to.
        environment: Conditions of bitwise equality besides world size and stage.
        bytes_read: Bytes of the checkpoint that this rank has read.
        notes: Messages to the user about how this attempt goes on.
        flops_per_token: See `train/mfu.py`.
        peak_flops: Of this rank's device; None where it is not known.
    """

    config: Config
    spec: RankSpec
    objective: Objective
    engine: Engine
    params: list[ParamInfo]
    dropout_keys: DropoutKeys
    loader: TrainLoader
    layout: RankLayout
    eval_sets: dict[str, PreparedSplit]
    vocab_size: int
    start_step: int
    fingerprint: Fingerprint
    environment: Environment
    bytes_read: int
    notes: list[str]
    flops_per_token: int
    peak_flops: float | None


def build_rank(spec: RankSpec) -> RankParts:
    """Build a rank and load its checkpoint, if the attempt starts from one. Collective.

    The process group must exist. At stage 3 each rank reads only its part of the weights, at other stages all of them.
    """
    attempt = spec.attempt
    config = attempt.config
    objective = build_objective(config.objective)
    model = _load_base(config, attempt.on_gpu)
    vocab_size = full_shape(model.get_input_embeddings().weight)[0]
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = select_trained(model, config)
    dropout_keys = install_sequence_dropout(model, config.run.seed)
    if config.method.neftune_alpha is not None:
        install_embedding_noise(model, config.method.neftune_alpha, dropout_keys)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    exported = export_names(model)
    state = optimizer_of(config.optimizer).state
    params = [ParamInfo(name, full_shape(p), exported[name], state) for p, name in names.items()]

    splits, eval_sets = list(attempt.inputs.splits), attempt.inputs.measured_sets
    shape = _model_shape(model, config)
    micro = _micro_batch_size(shape, config, spec, [*splits, *eval_sets.values()])
    engine = build_engine(
        ObjectiveModule(model),
        names,
        config,
        world_size=spec.world_size,
        micro_batch_size=micro,
        on_gpu=attempt.on_gpu,
    )
    layout = objective.layout(spec.rank, spec.world_size, micro, config.data.packing)
    here = environment(spec.num_threads, micro)
    restored = _restore(engine, attempt)
    notes = []
    if micro < config.train.micro_batch_size:
        notes.append(f"passes of {micro} sequences, not {config.train.micro_batch_size}: more do not fit a worker")
    if changed := restored.manifest.changed_conditions(spec.world_size, config.zero_stage, here) if restored else []:
        notes.append("equal within tolerance from here on, not bitwise: " + ", ".join(changed))
    return RankParts(
        config=config,
        spec=spec,
        objective=objective,
        engine=engine,
        params=params,
        dropout_keys=dropout_keys,
        loader=_build_loader(config, splits, attempt.inputs.num_positions, layout),
        layout=layout,
        eval_sets=eval_sets,
        vocab_size=vocab_size,
        start_step=restored.manifest.step if restored else 0,
        fingerprint=attempt.inputs.fingerprint,
        environment=here,
        bytes_read=restored.bytes_read if restored else 0,
        notes=notes,
        flops_per_token=flops_per_token(shape.num_params, shape.num_trained),
        peak_flops=peak_flops(here.device, config.model.torch_dtype),
    )


def _load_base(config: Config, on_gpu: bool) -> nn.Module:
    """Load the base model: whole, or at stage 3 this rank's part of it."""
    if config.zero_stage < 3:
        return load_model(config)
    model = skeleton(config)
    weights = WeightFiles(model_dir(config), model)
    if not weights.has_all:
        logger.warning("this family's weights are converted on loading: every rank holds the whole model meanwhile")
        return load_model(config)
    shard_model(model, config, weights.read, list(config.method.modules_to_save), on_gpu)
    return model


def _model_shape(model: nn.Module, config: Config) -> ModelShape:
    # A quantised matrix does not show how many elements it has.
    whole = model if quantisation_of(config) is None else select_trained(skeleton(config), config)
    shape = model_shape(whole, config, lambda parameter: prod(full_shape(parameter)))
    return replace(shape, state_bytes=optimizer_of(config.optimizer).state_bytes)


def _micro_batch_size(shape: ModelShape, config: Config, spec: RankSpec, splits: list[PreparedSplit]) -> int:
    """Return the sequences of a pass: as configured, or fewer if they do not fit into memory at this world size."""
    limit = device_memory_bytes(config, spec.attempt.on_gpu)
    rows_per_slot = build_objective(config.objective).rows_per_slot
    micro = fitting_batch(config, shape, splits, spec.world_size, limit, rows_per_slot).num_sequences
    return micro if limit is None else all_agree_on_least(micro)


def environment(num_threads: int, micro_batch_size: int) -> Environment:
    """Return the conditions of bitwise equality besides world size and ZeRO stage."""
    return Environment(
        versions={package: version(package) for package in _PACKAGES},
        micro_batch_size=micro_batch_size,
        num_threads=num_threads,
        processor=platform.machine(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )


def _build_loader(config: Config, splits: list[PreparedSplit], num_positions: int, layout: RankLayout) -> TrainLoader:
    opened = [open_split(split, config.data.loader) for split in splits]
    return TrainLoader(
        build_order(opened, config.data, config.run.seed),
        opened,
        layout,
        config.train.global_batch_size,
        num_positions,
        config.data.loader.prefetch_steps,
    )


@dataclass(frozen=True)
class _Restored:
    manifest: Manifest
    bytes_read: int


def _restore(engine: Engine, attempt: AttemptSpec) -> _Restored | None:
    if attempt.start_checkpoint is None:
        return None
    store = open_store(attempt.run_dir)
    manifest = Manifest.decode(store.read(attempt.start_checkpoint))
    reader = SliceReader(store, manifest)
    restore_slices(engine, reader, manifest.optimizer_step, manifest.optimizer_numbers)
    logger.info("restored step %d, %d bytes of slices read", manifest.step, reader.bytes_read)
    return _Restored(manifest, reader.bytes_read)
