"""Turns slices into plain safetensors, in bounded memory and without torch.

It lays out the output files, streams ranges through a cast, and writes the index last. Two threads read and cast the
next chunks while one is hashed and written. Peak memory is a few chunks, whatever the model's size. For an adapter only
adapter bytes move.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_ft.checkpoint.manifest import Manifest, SliceMap, check_coverage, read_slice_map
from dist_ft.checkpoint.tensorfile import ITEM_BYTES, is_finite, to_bfloat16, write_tensors
from dist_ft.errors import ExportError
from dist_ft.slices import ParamInfo
from dist_ft.storage.store import LocalStore, Store

Floats = npt.NDArray[np.float32]
ReadFrozen = Callable[[str, int, int], Floats]
"""(parameter, first element, count) → float32 elements. Threads call it at once."""
Read = Callable[[], Floats]
"""Returns one chunk of a parameter."""

_CHUNK_ELEMENTS = 1 << 19  # 2 MiB: a request to an object store is worth it, and a few of them are no memory
_NUM_READERS = 2
_CHUNKS_AHEAD = 3
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

    def chunks(param: ParamInfo) -> Iterator[Read]:
        if param.name in kept:
            assert read_frozen is not None
            return _frozen_chunks(param, read_frozen)
        weights = _slice_chunks(store, slices, param, "fp32")
        return weights if share is None else _averages(weights, _slice_chunks(store, slices, param, "z"), share)

    names = _shard_names(stem, len(shards))
    for name, params in zip(names, shards, strict=True):
        layout = [(param.export_name, code, param.shape) for param in params]
        works = (partial(_cast, param.name, read, code) for param in params for read in chunks(param))
        write_tensors(LocalStore(directory), name, layout, _done_ahead(works), {"format": "pt"})
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


def _cast(name: str, read: Read, code: str) -> memoryview:
    """Read a chunk and return the bytes that are stored of it; called on a thread."""
    values = read()
    if not is_finite(values, code):
        raise ExportError(f"{name} has values that are not finite; export an earlier step")
    stored: npt.NDArray[np.generic] = to_bfloat16(values) if code == "BF16" else values
    return stored.data.cast("B")


def _done_ahead(works: Iterable[Callable[[], memoryview]]) -> Iterator[memoryview]:
    """Do the works on threads, a few ahead of the one that is taken; yield the results in order."""
    running: deque[Future[memoryview]] = deque()
    with ThreadPoolExecutor(_NUM_READERS, "consolidate") as pool:
        try:
            for work in works:
                running.append(pool.submit(work))
                if len(running) > _CHUNKS_AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _averages(weights: Iterator[Read], fast: Iterator[Read], share: float) -> Iterator[Read]:
    """Yield the averaged weights x of schedule-free training: y = share x + (1 - share) z, solved for x."""

    def average(read_y: Read, read_z: Read) -> Floats:
        y = read_y()
        return y + np.float32(1 - 1 / share) * (read_z() - y)

    # A rank writes all kinds of a fragment, so the pieces of both are cut alike.
    return (partial(average, read_y, read_z) for read_y, read_z in zip(weights, fast, strict=True))


def _slice_chunks(store: Store, slices: SliceMap, param: ParamInfo, kind: str) -> Iterator[Read]:
    def read(file: str, offset: int, count: int) -> Floats:
        return np.frombuffer(store.read_range(file, offset, 4 * count), dtype="<f4")

    for piece in slices[(param.name, kind)]:
        for start in range(0, piece.count, _CHUNK_ELEMENTS):
            yield partial(read, piece.file, piece.offset + 4 * start, min(_CHUNK_ELEMENTS, piece.count - start))


def _frozen_chunks(param: ParamInfo, read: ReadFrozen) -> Iterator[Read]:
    for start in range(0, param.numel, _CHUNK_ELEMENTS):
        yield partial(read, param.name, start, min(_CHUNK_ELEMENTS, param.numel - start))


def _shard_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(path: Path, names: Sequence[str], shards: Sequence[Sequence[ParamInfo]], item_bytes: int) -> None:
    weight_map = {p.export_name: name for name, params in zip(names, shards, strict=True) for p in params}
    total = sum(p.numel for params in shards for p in params) * item_bytes
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
