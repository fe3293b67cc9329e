"""Cuts trained state out of DeepSpeed and puts it back, at any stage and world size.

One idea serves saving and loading: `fragments` lists which elements of which parameter this rank holds, with
views of the fp32 master and of the optimizer state. Saving copies out of the views, loading copies into them
and refreshes the low-precision weights. The private DeepSpeed names used are pinned by
`tests/contracts/test_deepspeed_names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dist_ft.slices import Setting, SliceKey
from dist_ft.zero.engine import Engine
from dist_ft.zero.optimizers import StateEntry
from dist_ft.zero.schedule_free import average_

ReadRange = Callable[[SliceKey, int], torch.Tensor]
"""(key with a start, number of elements) → float32 tensor [number of elements]."""

State = Mapping[torch.Tensor, StateEntry]


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

    def view(self, kind: str, state: State) -> torch.Tensor:
        """Return the view [n] of one kind of state."""
        if kind == "fp32":
            return self.master
        whole = state[self.flat][kind]
        assert isinstance(whole, torch.Tensor)
        return whole.view(-1)[self.offset : self.offset + self.master.numel()]


def fragments(engine: Engine, owned: bool) -> Iterator[Fragment]:
    """List the state this rank holds.

    Args:
        engine: The engine.
        owned: Give each element on one rank only. Differs at stage 0, where every rank holds everything.
    """
    if engine.stage == 0:
        for parameter, name in engine.names.items():
            count = parameter.numel()
            start, end = _share(count, dist.get_rank()) if owned else (0, count)
            if start < end:
                yield Fragment(name, start, parameter.detach().view(-1)[start:end], parameter, start)
    elif engine.stage == 3:
        yield from _stage3(engine.raw.optimizer, engine.names)
    else:
        yield from _stage12(engine.raw.optimizer, engine.names)


def collect_slices(engine: Engine) -> Iterator[tuple[SliceKey, torch.Tensor]]:
    """Yield this rank's slices as views; copy them before the next step changes them."""
    for fragment in fragments(engine, owned=True):
        for kind in ("fp32", *engine.optimizer.state):
            yield SliceKey(fragment.param, fragment.start, kind), fragment.view(kind, engine.inner.state)


def restore_slices(engine: Engine, read: ReadRange, step: int, numbers: Mapping[str, float]) -> None:
    """Load this rank's part of a checkpoint. Collective; over the group each element is read once.

    Args:
        engine: The engine.
        read: Source of the slices.
        step: Updates that the optimizer has made.
        numbers: What the optimizer keeps besides (`optimizer_numbers`).
    """
    state, kinds = engine.inner.state, ("fp32", *engine.optimizer.state)
    is_fused = bool(engine.inner.defaults.get("fused"))
    for flat in _flats(engine):
        state[flat] = engine.optimizer.empty_state(flat, step, numbers, is_fused)
    with torch.no_grad():
        for fragment in fragments(engine, owned=True):
            for kind in kinds:
                target = fragment.view(kind, state)
                target.copy_(read(SliceKey(fragment.param, fragment.start, kind), target.numel()))
        if engine.stage == 0:
            _exchange([fragment.view(kind, state) for fragment in fragments(engine, owned=False) for kind in kinds])
    _refresh_weights(engine)


@contextmanager
def averaged_weights(engine: Engine) -> Iterator[None]:
    """Compute with the averaged weights for a while, if the optimizer has any. Collective.

    The masters come back bit for bit. It costs a copy of this rank's masters meanwhile. An error leaves the averages:
    it ends the rank, and the refresh would wait for ranks that are elsewhere, so nobody would learn of the error.
    """
    share, state = engine.optimizer.average_share, engine.inner.state
    if share is None:
        yield
        return
    kept = {flat: flat.detach().clone() for flat in _flats(engine)}
    with torch.no_grad():
        for flat in kept:
            if fast := state.get(flat):  # none before the first step, when all weights are the same
                average_(flat, fast["z"], share)
    _refresh_weights(engine)
    yield
    with torch.no_grad():
        for flat, masters in kept.items():
            flat.copy_(masters)
    _refresh_weights(engine)


def optimizer_step(engine: Engine) -> int:
    """Return the optimizer's step counter, which is the same for every parameter."""
    return int(_counters(engine).get("step", 0))


def optimizer_numbers(engine: Engine) -> dict[str, float]:
    """Return the optimizer's numbers besides its step counter; most have none."""
    optimizer = engine.optimizer
    found = {name: float(_counters(engine).get(name, 0.0)) for name in optimizer.numbers}
    return found if optimizer.average_share is None else {**found, "average_share": optimizer.average_share}


def group_settings(engine: Engine) -> list[dict[str, Setting]]:
    """Return learning rate, decay, betas and eps of each optimizer group as they are now."""
    keys = ("lr", "initial_lr", "weight_decay", "eps")
    return [
        {**{key: group[key] for key in keys if key in group}, "betas": list(group["betas"])}
        for group in engine.raw.optimizer.param_groups
    ]


def _counters(engine: Engine) -> StateEntry:
    return next(iter(engine.inner.state.values()), {})


def _flats(engine: Engine) -> list[torch.Tensor]:
    """Return the tensors that the inner optimizer trains, each once."""
    return list({id(fragment.flat): fragment.flat for fragment in fragments(engine, owned=False)}.values())


def _exchange(wholes: list[torch.Tensor]) -> None:
    """Send what each rank has read to all others, one broadcast a rank. At stage 0 every rank holds all state."""
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


def _refresh_weights(engine: Engine) -> None:
    """Copy the masters to the weights that compute."""
    optimizer = engine.raw.optimizer
    if engine.stage == 0:
        return
    if engine.stage < 3:
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
