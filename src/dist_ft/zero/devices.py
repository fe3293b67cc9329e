"""The device of a rank: its settings of matrix products, and the backend that can join the ranks' devices.

The only place where precision and determinism of CUDA are set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_CUBLAS_WORKSPACE = ":4096:8"  # one of the two with which cuBLAS gives equal products equal bits


def use_device(local_rank: int) -> None:
    """Choose the CUDA device of this rank and how it computes; called before anything is put on it.

    Products of float32 matrices stay float32: TF32 has 10 bits of mantissa and would be seen in every comparison with
    a CPU. bfloat16 models are not touched by that. Variables that are set on the machine are not changed.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    os.environ.setdefault("NCCL_DEBUG", "WARN")  # NCCL's own reasons go to the rank's log
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # A forward pass of cuDNN's attention has a backward pass that adds in any order.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def sums_in_one_order(device: torch.device) -> Iterator[None]:
    """Let a backward pass on CUDA add in one order, so that its gradients are bitwise the same every time.

    Attention's kernels, among others, add in any order unless told otherwise. Forward passes are the same anyway, and
    some have kernels that refuse this setting.
    """
    if device.type != "cuda":
        yield
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each tensor
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def choose_backend(store: dist.Store, rank: int, world_size: int, device: str | None) -> str:
    """Return the backend that joins these ranks: nccl, unless they have no devices or share one. Collective.

    NCCL refuses two ranks on one device, which only small trials have.

    Args:
        store: The rendezvous store.
        rank: This rank.
        world_size: Ranks of the group.
        device: Identifies the device of this rank among those of all machines; None on a CPU.
    """
    if device is None:
        return "gloo"
    store.set(f"device/{rank}", device)
    devices = {store.get(f"device/{other}") for other in range(world_size)}
    return "nccl" if len(devices) == world_size else "gloo"


def device_id() -> str:
    """Return what identifies this rank's CUDA device among those of all machines."""
    return str(torch.cuda.get_device_properties().uuid)
