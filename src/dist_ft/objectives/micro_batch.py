"""Arrays of the loader → tensors on the rank's device."""

from __future__ import annotations

import torch

from dist_ft.data.stream.loader import MicroBatch


def to_device(micro: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns `input_ids`, `targets` and `position_ids` [B, T]; positions only where a row is packed.

    Without packing, plain causal attention is enough and has faster kernels.
    """
    steps = micro.position_ids[:, 1:] - micro.position_ids[:, :-1]
    positions = torch.from_numpy(micro.position_ids) if (steps != 1).any() else None
    return (
        torch.from_numpy(micro.input_ids).to(device, non_blocking=True),
        torch.from_numpy(micro.targets).to(device, non_blocking=True),
        None if positions is None else positions.to(device, non_blocking=True),
    )
