"""Builds a stage 3 model partition by partition, so that no process ever holds all of it.

`deepspeed.zero.Init` as a context builds every parameter at random, broadcasts it, and leaves loading to a
library that reads the whole checkpoint in every process. Here the parameters exist on `meta` only; each is
cut while it is still empty, and each rank fills its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import nn

from dist_ft.config import Config
from dist_ft.zero.ds_config import build_init_config

ReadWeights = Callable[[str, int, int], torch.Tensor]
"""(parameter name, first element, count) → tensor [count] of the flattened parameter."""


def shard_model(module: nn.Module, config: Config, read: ReadWeights, whole: list[str], on_gpu: bool) -> None:
    """Give the parameters of a model on `meta` their partitions, read by range.

    Args:
        module: The model; its parameters are replaced in place, ties kept.
        config: The run config, stage 3.
        read: Source of the weights.
        whole: Names of modules whose parameters are filled but not cut yet, because they will be copied.
        on_gpu: Whether ranks run on CUDA devices.
    """
    cutter = Init(config_dict_or_path=build_init_config(config, on_gpu))
    made: dict[int, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        # PEFT matches modules by the end of their names and takes everything below them.
        parents = list(accumulate(prefix.split("."), "{}.{}".format))
        keep_whole = any(parent.endswith(name) for parent in parents for name in whole)
        for leaf, old in owner.named_parameters(recurse=False):
            if id(old) not in made:
                name = f"{prefix}.{leaf}" if prefix else leaf
                made[id(old)] = _make(cutter, name, old, read, keep_whole)
            owner._parameters[leaf] = made[id(old)]
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in persistent:
            buffer.copy_(read(name, 0, buffer.numel()).view_as(buffer))


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the full shape of a parameter, even if it is partitioned."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def _make(cutter: Any, name: str, old: nn.Parameter, read: ReadWeights, keep_whole: bool) -> nn.Parameter:
    # On CPU, untouched memory costs nothing, and only this rank's part of the empty tensor is written or read.
    empty = torch.empty(old.shape, dtype=old.dtype, device=cutter.local_device)
    parameter = nn.Parameter(empty, requires_grad=old.requires_grad)
    with torch.no_grad():
        if keep_whole:
            parameter.view(-1).copy_(read(name, 0, parameter.numel()))
            return parameter
        cutter._convert_to_deepspeed_param(parameter)
        parameter.partition()
        own = parameter.ds_tensor
        start = torch.distributed.get_rank() * own.ds_numel
        count = min(own.ds_numel, parameter.ds_numel - start)  # the last partitions end in padding
        if count > 0:
            own[:count].copy_(read(name, start, count))
    return parameter
