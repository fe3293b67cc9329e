"""Turns slices into plain safetensors, in bounded memory and without torch.

It lays out the output files, streams ranges through a cast, and writes the index last. Peak memory is one chunk,
whatever the model's size. For an adapter only adapter bytes move.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_ft.checkpoint.manifest import Manifest, SliceMap, check_coverage, read_slice_map
from dist_ft.checkpoint.tensorfile import ITEM_BYTES, to_bfloat16, write_tensors
from dist_ft.errors import ExportError
from dist_ft.slices import ParamInfo
from dist_ft.storage.store import LocalStore, Store

Floats = npt.NDArray[np.float32]
Chunk = tuple[str, Floats]
ReadFrozen = Callable[[str, int, int], Floats]
"""(parameter, first element, count) → float32 elements."""

_CHUNK_ELEMENTS = 1 << 22
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def consolidate(
    store: Store,
    manifest: Manifest,
    directory: Path,
    *,
    stem: str,
    dtype: str,
    max_shard_bytes: int = 5 << 30,
    frozen: Sequence[ParamInfo] = (),
    read_frozen: ReadFrozen | None = None,
) -> list[Path]:
    """Write the weights of a checkpoint as `<stem>.safetensors`, in shards with an index if large.

    Args:
        store: The run directory.
        manifest: The checkpoint.
        directory: Where the files go.
        stem: `model` or `adapter_model`.
        dtype: `float32` or `bfloat16`.
        max_shard_bytes: Largest file, unless one tensor is larger.
        frozen: Parameters that no checkpoint holds, because they are the base model's.
        read_frozen: Where those come from.

    Raises:
        CheckpointError: The slices do not cover a parameter.
        ExportError: A value is not finite.
    """
    code = _DTYPES[dtype]
    slices = read_slice_map(store, manifest)
    check_coverage(manifest.params, slices)
    shards = plan_shards([*manifest.params, *frozen], ITEM_BYTES[code], max_shard_bytes)
    kept = {param.name for param in frozen}
    share = manifest.optimizer_numbers.get("average_share")

    def read_trained(param: ParamInfo) -> Iterator[Chunk]:
        weights = _read_slices(store, slices, param, "fp32")
        return weights if share is None else _averages(weights, _read_slices(store, slices, param, "z"), share)

    names = _shard_names(stem, len(shards))
    for name, params in zip(names, shards, strict=True):
        layout = [(param.export_name, code, param.shape) for param in params]
        values = (
            chunk
            for param in params
            for chunk in (_read_base(param, read_frozen) if param.name in kept else read_trained(param))
        )
        write_tensors(LocalStore(directory), name, layout, _cast(values, code), {"format": "pt"})
    if len(names) > 1:
        _write_index(directory / f"{stem}.safetensors.index.json", names, shards, ITEM_BYTES[code])
    return [directory / name for name in names]


def plan_shards(params: Sequence[ParamInfo], item_bytes: int, max_bytes: int) -> list[list[ParamInfo]]:
    """Cut the parameters, in order, into files of at most `max_bytes`."""
    shards: list[list[ParamInfo]] = [[]]
    used = 0
    for param in params:
        size = param.numel * item_bytes
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(param)
        used += size
    return shards


def _averages(weights: Iterator[Chunk], fast: Iterator[Chunk], share: float) -> Iterator[Chunk]:
    """Yield the averaged weights x of schedule-free training: y = share x + (1 - share) z, solved for x."""
    # A rank writes all kinds of a fragment, so the pieces of both are cut alike.
    for (name, y), (_, z) in zip(weights, fast, strict=True):
        yield name, y + np.float32(1 - 1 / share) * (z - y)


def _read_slices(store: Store, slices: SliceMap, param: ParamInfo, kind: str) -> Iterator[Chunk]:
    for piece in slices[(param.name, kind)]:
        for start in range(0, piece.count, _CHUNK_ELEMENTS):
            count = min(_CHUNK_ELEMENTS, piece.count - start)
            data = store.read_range(piece.file, piece.offset + 4 * start, 4 * count)
            yield param.name, np.frombuffer(data, dtype="<f4")


def _read_base(param: ParamInfo, read: ReadFrozen | None) -> Iterator[Chunk]:
    assert read is not None
    for start in range(0, param.numel, _CHUNK_ELEMENTS):
        yield param.name, read(param.name, start, min(_CHUNK_ELEMENTS, param.numel - start))


def _cast(chunks: Iterable[Chunk], code: str) -> Iterator[bytes]:
    for name, values in chunks:
        bits = to_bfloat16(values) if code == "BF16" else None
        # Exponent all ones: NaN, infinite, or beyond what bfloat16 holds.
        is_finite = np.isfinite(values).all() if bits is None else (bits & 0x7F80 != 0x7F80).all()
        if not is_finite:
            raise ExportError(f"{name} has values that are not finite; export an earlier step")
        yield (values if bits is None else bits).tobytes()


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[ParamInfo]], item_bytes: int) -> None:
    weight_map = {p.export_name: name for name, params in zip(names, shards, strict=True) for p in params}
    total = sum(p.numel for params in shards for p in params) * item_bytes
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
