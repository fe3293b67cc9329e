"""Writes the slices of one rank and reads them back by range. Only the coordinator commits a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from dist_ft.checkpoint.manifest import Manifest, SlicePiece, read_slice_map
from dist_ft.checkpoint.tensorfile import write_tensors
from dist_ft.errors import CheckpointError
from dist_ft.slices import SliceKey, WrittenFile
from dist_ft.storage.store import Store


class HostCopies:
    """Float32 copies of slices in host memory, which the next step does not change.

    The memory is kept for the next copies: taking it from the system anew costs five times the copy itself. So copies
    hold until the next call of `copy`. From a CUDA device all copies run at once, into pinned memory, on a stream of
    their own beside the work that the device is given meanwhile.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def num_new_bytes(self, slices: Sequence[tuple[SliceKey, torch.Tensor]]) -> int:
        """Return the memory that copies of these slices take besides what is kept."""
        return 0 if self._fits(slices) else 4 * sum(tensor.numel() for _, tensor in slices)

    def copy(self, slices: Sequence[tuple[SliceKey, torch.Tensor]]) -> list[tuple[SliceKey, torch.Tensor]]:
        """Return the slices as copies."""
        if not self._fits(slices):
            self._kept = []  # before the new ones are taken
            self._kept = [torch.empty(t.shape, dtype=torch.float32, pin_memory=t.is_cuda) for _, t in slices]
        if slices and slices[0][1].is_cuda:
            self._copy_from_cuda([tensor for _, tensor in slices])
        else:
            for (_, tensor), kept in zip(slices, self._kept, strict=True):
                # NumPy copies with one thread: a second team of OpenMP's would hold up the one that trains.
                np.copyto(kept.numpy(), tensor.detach().float().numpy())
        return [(key, kept) for (key, _), kept in zip(slices, self._kept, strict=True)]

    def _copy_from_cuda(self, tensors: Sequence[torch.Tensor]) -> None:
        device = tensors[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))  # on which the update has written the tensors
        with torch.cuda.stream(stream):
            for tensor, kept in zip(tensors, self._kept, strict=True):
                kept.copy_(tensor.detach(), non_blocking=True)
        stream.synchronize()

    def _fits(self, slices: Sequence[tuple[SliceKey, torch.Tensor]]) -> bool:
        return [tensor.shape for _, tensor in slices] == [kept.shape for kept in self._kept]


def write_slices(store: Store, name: str, slices: Iterable[tuple[SliceKey, torch.Tensor]]) -> WrittenFile:
    """Write a rank's slices as float32; the file appears under its name when whole."""
    found = [(key.encode(), tensor) for key, tensor in slices]
    layout = [(name, "F32", (tensor.numel(),)) for name, tensor in found]
    # One tensor at a time goes to the host, so a GPU's state is never held twice.
    chunks = (memoryview(tensor.detach().float().cpu().contiguous().numpy()).cast("B") for _, tensor in found)
    return write_tensors(store, name, layout, chunks)


class SliceReader:
    """Reads any range of any trained parameter from a committed checkpoint.

    The manifest's piece index says where it lies, so a rank asks the store for its own bytes and nothing else. Only a
    manifest of before, which has no index, costs the headers of all slice files.

    Attributes:
        bytes_read: What was asked of the store, headers excluded.
    """

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self._manifest = manifest
        self._slices = read_slice_map(store, manifest) if manifest.pieces is None else None
        self.bytes_read = 0

    def __call__(self, key: SliceKey, count: int) -> torch.Tensor:
        """Return `count` elements from `key.start` on, as float32 [count].

        Raises:
            CheckpointError: The checkpoint does not hold them.
        """
        parts = []
        position, end = key.start, key.start + count
        for piece in self._find_pieces(key):
            if piece.start + piece.count <= position:
                continue
            if piece.start > position or position == end:
                break  # a gap, or done
            first = position - piece.start
            length = min(piece.count - first, end - position)
            parts.append(self._store.read_range(piece.file, piece.offset + 4 * first, 4 * length))
            self.bytes_read += 4 * length
            position += length
        if position != end:
            raise CheckpointError(f"{key.param} ({key.kind}): elements {position}..{end - 1} are not in the checkpoint")
        return torch.from_numpy(np.frombuffer(b"".join(parts), dtype="<f4").copy())

    def _find_pieces(self, key: SliceKey) -> list[SlicePiece]:
        if self._slices is None:
            return self._manifest.find_pieces(key.param, key.kind)
        return self._slices.get((key.param, key.kind), [])
