"""Cuts trained state out of DeepSpeed and puts it back, at any stage and world size.

One idea serves saving and loading: `fragments` lists which elements of which parameter this rank holds, with
views of the fp32 master and of the optimizer state. Saving copies out of the views, loading copies into them
and refreshes the low-precision weights. The private DeepSpeed names used are pinned by
`tests/contracts/test_deepspeed_names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ft.slices import STATE_KINDS, Setting, SliceKey

ReadRange = Callable[[SliceKey, int], torch.Tensor]
"""(key with a start, number of elements) → float32 tensor [number of elements]."""


@dataclass(frozen=True)
class Fragment:
    """A part of one parameter's state on this rank.

    Attributes:
        param: Name of the parameter.
        start: First element in the flattened parameter.
        master: View [n] of the fp32 weights.
        flat: The tensor that the inner optimizer keeps state for.
        offset: Where the fragment begins in `flat`.
    """

    param: str
    start: int
    master: torch.Tensor
    flat: torch.Tensor
    offset: int

    def view(self, kind: str, state: Mapping[Any, Any]) -> torch.Tensor:
        """Returns the view [n] of one kind of state."""
        if kind == "fp32":
            return self.master
        whole: torch.Tensor = state[self.flat][kind]
        return whole.view(-1)[self.offset : self.offset + self.master.numel()]


def fragments(engine: Any, names: Mapping[nn.Parameter, str], owned: bool) -> Iterator[Fragment]:
    """Lists the state this rank holds.

    Args:
        engine: DeepSpeed engine.
        names: Trained parameters and their names.
        owned: Give each element on one rank only. Differs at stage 0, where every rank holds everything.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        yield from _plain(names, owned)
    elif stage == 3:
        yield from _stage3(engine.optimizer, names)
    else:
        yield from _stage12(engine.optimizer, names)


def collect_slices(engine: Any, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[SliceKey, torch.Tensor]]:
    """Yields this rank's slices as views; copy them before the next step changes them."""
    state = _optimizer_state(engine)
    for fragment in fragments(engine, names, owned=True):
        for kind in STATE_KINDS:
            yield SliceKey(fragment.param, fragment.start, kind), fragment.view(kind, state)


def restore_slices(engine: Any, names: Mapping[nn.Parameter, str], read: ReadRange, optimizer_step: int) -> None:
    """Loads this rank's part of a checkpoint. Collective; over the group each element is read once."""
    state = _optimizer_state(engine)
    for flat in {id(f.flat): f.flat for f in fragments(engine, names, owned=False)}.values():
        state[flat] = _adam_state(flat, optimizer_step, fused=bool(_inner(engine).defaults.get("fused")))
    with torch.no_grad():
        for fragment in fragments(engine, names, owned=True):
            for kind in STATE_KINDS:
                target = fragment.view(kind, state)
                target.copy_(read(SliceKey(fragment.param, fragment.start, kind), target.numel()))
        if engine.zero_optimization_stage() == 0:
            _exchange(names, state)
    _refresh_weights(engine)


def optimizer_step(engine: Any) -> int:
    """Returns Adam's step counter, which is the same for every parameter."""
    for entry in _optimizer_state(engine).values():
        return int(entry["step"])
    return 0


def group_settings(engine: Any) -> list[dict[str, Setting]]:
    """Returns learning rate, decay, betas and eps of each optimizer group as they are now."""
    keys = ("lr", "initial_lr", "weight_decay", "eps")
    groups = engine.optimizer.param_groups
    return [{**{key: group[key] for key in keys}, "betas": list(group["betas"])} for group in groups]


def _inner(engine: Any) -> Any:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _optimizer_state(engine: Any) -> Any:
    return _inner(engine).state


def _adam_state(flat: torch.Tensor, step: int, fused: bool) -> dict[str, torch.Tensor]:
    """What torch's AdamW makes in its first step."""
    device = flat.device if fused else "cpu"
    return {
        "step": torch.tensor(float(step), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(flat, dtype=torch.float32),
        "exp_avg_sq": torch.zeros_like(flat, dtype=torch.float32),
    }


def _plain(names: Mapping[nn.Parameter, str], owned: bool) -> Iterator[Fragment]:
    for parameter, name in names.items():
        count = parameter.numel()
        start, end = _share(count, dist.get_rank()) if owned else (0, count)
        if start < end:
            yield Fragment(name, start, parameter.detach().view(-1)[start:end], parameter, start)


def _exchange(names: Mapping[nn.Parameter, str], state: Mapping[Any, Any]) -> None:
    """Gives every rank all of what each has read, one broadcast a rank: at stage 0 everybody holds everything."""
    wholes = [fragment.view(kind, state) for fragment in _plain(names, owned=False) for kind in STATE_KINDS]
    for rank in range(dist.get_world_size()):
        parts = [whole[slice(*_share(whole.numel(), rank))] for whole in wholes]
        joined = torch.cat(parts)
        dist.broadcast(joined, src=rank)
        for part, values in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.copy_(values)


def _share(count: int, rank: int) -> tuple[int, int]:
    world_size = dist.get_world_size()
    return count * rank // world_size, count * (rank + 1) // world_size


def _stage12(optimizer: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    # bfloat16 with float32 accumulation at stage 1 is DeepSpeed's BF16_Optimizer, with other field names.
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    else:
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # no element of it lies in this rank's partition
                continue
            address = mapping.get_hp_fragment_address()
            master = flat.detach()[address.start : address.start + address.numel]
            yield Fragment(names[parameter], mapping.lp_fragment_address.start, master, flat, address.start)


def _stage3(optimizer: Any, names: Mapping[nn.Parameter, str]) -> Iterator[Fragment]:
    rank = dist.get_rank()
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            partition = parameter.ds_tensor.ds_numel
            start = rank * partition
            count = min(partition, parameter.ds_numel - start)  # the last partitions end in padding
            if count > 0:
                yield Fragment(names[parameter], start, flat.detach()[offset : offset + count], flat, offset)
            offset += partition


def _refresh_weights(engine: Any) -> None:
    """Makes the weights that compute follow the masters."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return
    if stage < 3:
        optimizer.update_lp_params()
        return
    for i, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        flat = optimizer.fp16_partitioned_groups_flat[i]
        flat.data.copy_(master.data)
        views = optimizer.unflatten(flat, optimizer.fp16_partitioned_groups[i])
        for partition, view in zip(optimizer.fp16_partitioned_groups[i], views, strict=True):
            partition.data = view.data
    persistent = optimizer.persistent_parameters
    if persistent:
        # These stay gathered; cut them to the new values and gather again.
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
