"""Finds the memory that the ranks of a group may use."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dist_ft.config import Config
from dist_ft.zero.devices import device_id

_RUNTIME_BYTES = 1 << 30  # CUDA context and libraries


def device_memory_bytes(config: Config, on_gpu: bool) -> int | None:
    """Return the memory that this rank may use, or None if it is not known.

    The memory that happens to be free does not matter: the same shape must run the same passes every time. Ranks that
    share a device share its memory. Collective on GPUs.
    """
    if (limit := config.cluster.memory_per_worker_bytes) is not None:
        return limit
    if not on_gpu:
        return None
    devices = [""] * dist.get_world_size()
    dist.all_gather_object(devices, device_id())
    total: int = torch.cuda.get_device_properties().total_memory
    return total // devices.count(device_id()) - _RUNTIME_BYTES


def all_agree_on_least(value: int) -> int:
    """Return the smallest value of all ranks. Collective."""
    tensor = torch.tensor([value], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return int(tensor)
