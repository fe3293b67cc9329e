"""Wires one rank: model, adapter, dropout, engine, data. The only place where these packages meet."""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ft.batch import num_micro_steps
from dist_ft.checkpoint.manifest import Fingerprint, Manifest
from dist_ft.checkpoint.snapshot import SliceReader
from dist_ft.checkpoint.store import LocalStore
from dist_ft.config import Config, config_from_dict
from dist_ft.messages import AttemptSpec, RankSpec
from dist_ft.model.adapter import export_names
from dist_ft.model.base import load_model, model_dir, skeleton
from dist_ft.model.dropout import DropoutKeys, install_sequence_dropout
from dist_ft.model.loss import TokenLoss
from dist_ft.model.trained import select_trained
from dist_ft.model.weights import WeightFiles
from dist_ft.state import ParamInfo
from dist_ft.stream.cache import PreparedSplit
from dist_ft.stream.loader import RankLayout, TrainLoader, build_order
from dist_ft.zero.engine import build_engine
from dist_ft.zero.sharding import full_shape, shard_model
from dist_ft.zero.slices import restore_slices

logger = logging.getLogger(__name__)

_PACKAGES = ("dist-ft", "torch", "deepspeed", "transformers", "peft", "ray")


@dataclass
class RankParts:
    """Everything the loop works with on one rank.

    Attributes:
        config: The run config.
        spec: What the rank was told.
        engine: DeepSpeed engine around `TokenLoss`.
        names: Trained parameters and their names.
        params: The same, as every process sees them.
        dropout_keys: Keys to set before each micro batch.
        loader: Steps of the run.
        layout: This rank's part of a batch.
        eval_split: Held-out split, or None.
        vocab_size: Rows of the embedding.
        start_step: Completed steps at the start of this attempt.
        fingerprint: What checkpoints belong to.
    """

    config: Config
    spec: RankSpec
    engine: Any
    names: dict[nn.Parameter, str]
    params: list[ParamInfo]
    dropout_keys: DropoutKeys
    loader: TrainLoader
    layout: RankLayout
    eval_split: PreparedSplit | None
    vocab_size: int
    start_step: int
    fingerprint: Fingerprint


def build_rank(spec: RankSpec) -> RankParts:
    """Builds a rank and loads its checkpoint, if the attempt starts from one. Collective.

    The process group must exist. Every rank builds the same weights; DeepSpeed broadcasts rank 0's anyway.
    """
    attempt = spec.attempt
    config = config_from_dict(attempt.config)
    model = _load_base(config, attempt.on_gpu)
    vocab_size = full_shape(model.get_input_embeddings().weight)[0]
    if config.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = select_trained(model, config)
    if config.method.kind == "lora" and config.train.gradient_checkpointing:
        model.enable_input_require_grads()
    dropout_keys = install_sequence_dropout(model, config.run.seed)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    exported = export_names(model)
    params = [ParamInfo(name, full_shape(p), exported[name]) for p, name in names.items()]

    micro_steps = num_micro_steps(config.train.global_batch_size, config.train.micro_batch_size, spec.world_size)
    engine, ds_config = build_engine(
        TokenLoss(model),
        names,
        config,
        world_size=spec.world_size,
        num_micro_steps=micro_steps,
        on_gpu=attempt.on_gpu,
    )
    logger.info("DeepSpeed config: %s", ds_config)
    layout = RankLayout(spec.rank, spec.world_size, config.train.micro_batch_size)
    return RankParts(
        config=config,
        spec=spec,
        engine=engine,
        names=names,
        params=params,
        dropout_keys=dropout_keys,
        loader=_build_loader(config, attempt, layout),
        layout=layout,
        eval_split=PreparedSplit.from_dict(attempt.eval_split) if attempt.eval_split else None,
        vocab_size=vocab_size,
        start_step=_restore(engine, names, attempt),
        fingerprint=Fingerprint(**attempt.fingerprint),
    )


def _load_base(config: Config, on_gpu: bool) -> Any:
    """Loads the base model: whole, or at stage 3 this rank's part of it."""
    if config.zero_stage < 3:
        return load_model(config)
    model = skeleton(config)
    weights = WeightFiles(model_dir(config), model)
    if not weights.has_all:
        logger.warning("this family's weights are converted on loading: every rank holds the whole model meanwhile")
        return load_model(config)
    shard_model(model, config, weights.read, list(config.method.modules_to_save), on_gpu)
    return model


def environment(num_threads: int) -> dict[str, Any]:
    """Returns what bitwise equality depends on besides the shape of the group."""
    return {
        "versions": {package: version(package) for package in _PACKAGES},
        "num_threads": num_threads,
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _build_loader(config: Config, attempt: AttemptSpec, layout: RankLayout) -> TrainLoader:
    opened = [PreparedSplit.from_dict(split).open() for split in attempt.splits]
    return TrainLoader(
        build_order(opened, config.data.weights, config.run.seed),
        opened,
        layout,
        config.train.global_batch_size,
        attempt.num_positions,
    )


def _restore(engine: Any, names: dict[nn.Parameter, str], attempt: AttemptSpec) -> int:
    if attempt.start_checkpoint is None:
        return 0
    store = LocalStore(Path(attempt.run_dir))
    manifest = Manifest.decode(store.read(attempt.start_checkpoint))
    reader = SliceReader(store, manifest)
    restore_slices(engine, names, reader, manifest.optimizer_step)
    logger.info("restored step %d, %d bytes of slices read", manifest.step, reader.bytes_read)
    return manifest.step
