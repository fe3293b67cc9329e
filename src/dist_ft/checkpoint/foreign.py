"""Reads the trained state in checkpoints of DeepSpeed (ZeRO 1 to 3) and of the Hugging Face Trainer.

Their files are pickles. They are opened with `torch.load(weights_only=True)`, which builds tensors, containers and
numbers, and besides only the classes of `_ALLOWED`, as classes of this module that hold values and do nothing. A file
that asks for more is refused, with the name of what it asks for. Files are mapped, and read one after the other.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from dist_ft.errors import CheckpointError, UsageError
from dist_ft.slices import ADAM_STATE, ParamInfo, SliceKey

Piece = tuple[SliceKey, torch.Tensor]
"""A run of elements of one parameter, of one kind."""


class _Address:
    """Stands for DeepSpeed's address of a fragment: `numel` elements from `start` on."""

    numel: int
    start: int


class _Ignored:
    """Stands for an object of which nothing is needed."""


_ALLOWED = [
    (_Address, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""The classes that a checkpoint may name, and what is built in their place."""


@dataclass(frozen=True)
class ZeroFiles:
    """A checkpoint of DeepSpeed.

    Attributes:
        is_stage3: Whether it is of stage 3, which is laid out otherwise.
        model_file: Counters, and names and shapes.
        optimizer_files: The state of each rank.
    """

    is_stage3: bool
    model_file: Path
    optimizer_files: tuple[Path, ...]


@dataclass(frozen=True)
class Counters:
    """What a checkpoint says besides its state.

    Attributes:
        step: Completed optimizer steps.
        optimizer_step: Updates that the optimizer has made; fewer where steps were skipped.
        num_samples: Sequences that were used.
    """

    step: int
    optimizer_step: int
    num_samples: int


def load_plainly(path: Path) -> Any:
    """Return what a file of `torch.save` holds, if it is made of tensors and the classes of `_ALLOWED`.

    Raises:
        CheckpointError: It asks for anything else, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global|function|class) ([\w.]+\.[\w.]+)", str(error))
        what = f"asks for {wanted[1]}" if wanted else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} {what}, and only tensors and DeepSpeed's own records of them are read from a pickle; save weights "
            "and optimizer without other objects, or take over the weights alone (method.init_from, model.name)"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is not a file of torch.save as of torch 1.6: {error}") from error


def find_zero_files(source: Path) -> ZeroFiles | None:
    """Return the files of a checkpoint of DeepSpeed: of a folder such as `global_step40`, or the one `latest` names.

    Raises:
        UsageError: It is of a kind that is not read, such as pipeline or tensor parallelism.
    """
    folder = source
    if (source / "latest").is_file():
        folder = source / (source / "latest").read_text(encoding="utf-8").strip()
    files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not files:
        return None
    if others := [path.name for path in folder.glob("*mp_rank_*") if "mp_rank_00" not in path.name]:
        raise UsageError(f"{folder} is of tensor or pipeline parallelism ({others[0]}), which is not read")
    if [_rank_of(path) for path in files] != list(range(len(files))):
        raise UsageError(f"{folder} lacks the files of some ranks: it has {', '.join(path.name for path in files)}")
    whole, of_rank = folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    model_file = whole if whole.is_file() else of_rank
    if not model_file.is_file():
        raise UsageError(f"{folder} has no {whole.name} and no {of_rank.name}")
    return ZeroFiles(model_file == of_rank, model_file, tuple(files))


def read_counters(files: ZeroFiles) -> Counters:
    """Return the counters of a checkpoint of DeepSpeed."""
    state = load_plainly(files.model_file)
    step = int(state["global_steps"])
    return Counters(step, step - int(state["skipped_steps"]), int(state["global_samples"]))


def read_zero(files: ZeroFiles) -> Iterator[list[Piece]]:
    """Yield the state that each rank of DeepSpeed has saved.

    Raises:
        CheckpointError: A file cannot be read, or its optimizer is not AdamW.
    """
    return _read_stage3(files) if files.is_stage3 else _read_stage12(files)


def _read_stage12(files: ZeroFiles) -> Iterator[list[Piece]]:
    ends: dict[str, int] = {}  # the ranks hold a parameter's fragments in their order
    for path in files.optimizer_files:
        optimizer = _optimizer_of(path)
        masters = optimizer["single_partition_of_fp32_groups"]
        states = optimizer["base_optimizer_state"]["state"]
        pieces: list[Piece] = []
        for group, addresses in enumerate(optimizer["param_slice_mappings"]):
            flats = {"fp32": masters[group], **_moments(states[group], path)}
            for name, address in addresses.items():
                begin = ends.get(name, 0)
                pieces += [
                    (SliceKey(name, begin, kind), flat.narrow(0, address.start, address.numel))
                    for kind, flat in flats.items()
                ]
                ends[name] = begin + address.numel
        yield pieces


def _read_stage3(files: ZeroFiles) -> Iterator[list[Piece]]:
    groups: Sequence[Mapping[str, Sequence[int]]] = load_plainly(files.model_file)["param_shapes"]
    world_size = len(files.optimizer_files)
    for rank, path in enumerate(files.optimizer_files):
        optimizer = _optimizer_of(path)
        states = optimizer["optimizer_state_dict"]["state"]
        pieces: list[Piece] = []
        for group, shapes in enumerate(groups):
            flats = {"fp32": optimizer["fp32_flat_groups"][group], **_moments(states[group], path)}
            offset = 0
            for name, shape in shapes.items():
                numel = prod(shape)
                length = -(-numel // world_size)
                count = min(length, numel - rank * length)  # the last partitions end in padding
                if count > 0:
                    pieces += [
                        (SliceKey(name, rank * length, kind), flat.narrow(0, offset, count))
                        for kind, flat in flats.items()
                    ]
                offset += length
        yield pieces


def read_trainer_moments(path: Path, params: Sequence[ParamInfo]) -> list[Piece]:
    """Return the moments in the Trainer's `optimizer.pt`, which knows its parameters by number only.

    The Trainer makes two groups, the matrices and the rest, each in the order of the model. Shapes are compared.

    Args:
        path: The file.
        params: The trained parameters, in the order of the model.

    Raises:
        CheckpointError: It is of another model, or of another optimizer than AdamW.
    """
    states = load_plainly(path)["state"]
    # By name as well: the Trainer decays neither norms nor biases, and both have one dimension in the models we train.
    ordered = [p for p in params if len(p.shape) > 1] + [p for p in params if len(p.shape) <= 1]
    if len(states) != len(ordered):
        raise CheckpointError(f"{path} has the state of {len(states)} parameters, and the config trains {len(ordered)}")
    pieces: list[Piece] = []
    for number, param in enumerate(ordered):
        for kind, tensor in _moments(states[number], path).items():
            if tuple(tensor.shape) != param.shape:
                shapes = f"shape {list(tensor.shape)}, and {param.name} has {list(param.shape)}"
                raise CheckpointError(f"{path}: parameter {number} has {shapes}")
            pieces.append((SliceKey(param.name, 0, kind), tensor.reshape(-1)))
    return pieces


def _optimizer_of(path: Path) -> Any:
    return load_plainly(path)["optimizer_state_dict"]


def _moments(state: Mapping[str, Any], path: Path) -> dict[str, torch.Tensor]:
    if not state.keys() >= {*ADAM_STATE}:
        found = ", ".join(sorted(map(str, state)))
        raise CheckpointError(
            f"{path} holds {found or 'nothing'} of a parameter, and AdamW has {', '.join(ADAM_STATE)}"
        )
    return {kind: state[kind] for kind in ADAM_STATE}


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found[1]) if found else -1
