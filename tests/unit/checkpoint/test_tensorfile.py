"""Our safetensors writer and reader against the real library, and the cast to bfloat16 against torch's."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_ft.checkpoint.tensorfile import hash_file, read_header, to_bfloat16, write_tensors
from dist_ft.errors import CheckpointError
from dist_ft.storage.store import LocalStore

SHAPES = {"odd": (3, 5), "scalar": (), "vector": (7,), "üñí|0|fp32": (2, 1, 4)}


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def _bytes(tensors: Iterable[torch.Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


def _layout(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_library_reads_what_we_write(tmp_path: Path, chunk: int) -> None:
    tensors = _tensors()
    data = _bytes(tensors.values())
    chunks = [memoryview(data)[at : at + chunk] for at in range(0, len(data), chunk)]
    write_tensors(LocalStore(tmp_path), "a.safetensors", _layout(tensors), chunks, {"format": "pt"})
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_library_reads_our_bfloat16(tmp_path: Path) -> None:
    values = torch.randn(3, 4)
    data = to_bfloat16(values.numpy().reshape(-1)).tobytes()
    write_tensors(LocalStore(tmp_path), "a.safetensors", [("w", "BF16", (3, 4))], [data])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], values.bfloat16())


def test_we_read_any_range_of_what_the_library_writes(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    store = LocalStore(tmp_path)
    header = read_header(store, "a.safetensors")
    assert {name: entry.shape for name, entry in header.items()} == SHAPES
    for name, tensor in tensors.items():
        flat, entry = tensor.reshape(-1).numpy(), header[name]
        assert entry.numel == flat.size
        for start in range(flat.size):
            for count in range(flat.size - start + 1):
                found = np.frombuffer(store.read_range("a.safetensors", entry.offset + 4 * start, 4 * count), "<f4")
                assert np.array_equal(found, flat[start : start + count])


def test_the_hash_of_the_file_is_the_one_reported(tmp_path: Path) -> None:
    tensors = _tensors()
    written = write_tensors(LocalStore(tmp_path), "a", _layout(tensors), [_bytes(tensors.values())])
    store = LocalStore(tmp_path)
    assert written.name == "a"
    assert written.num_bytes == (tmp_path / "a").stat().st_size
    for chunk_bytes in (1, 10, 1 << 24):
        assert hash_file(store, "a", written.num_bytes, chunk_bytes=chunk_bytes) == written.xxh3


@pytest.mark.parametrize("num_bytes", [0, 4, 11, 13, 16])
def test_data_of_another_size_than_the_layout_leaves_no_file(tmp_path: Path, num_bytes: int) -> None:
    with pytest.raises(CheckpointError, match=f"{num_bytes} bytes of data for a layout of 12"):
        write_tensors(LocalStore(tmp_path), "a", [("w", "F32", (3,))], [bytes(num_bytes)])
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    def chunks() -> Iterable[bytes]:
        yield bytes(4)
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        write_tensors(LocalStore(tmp_path), "a", [("w", "F32", (3,))], chunks())
    assert list(tmp_path.iterdir()) == []


def test_writing_again_replaces_the_file_whole(tmp_path: Path) -> None:
    write_tensors(LocalStore(tmp_path), "a", [("w", "F32", (3,))], [bytes(12)])
    write_tensors(LocalStore(tmp_path), "a", [("v", "F32", (1,))], [bytes(4)])
    assert list(read_header(LocalStore(tmp_path), "a")) == ["v"]


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


GARBAGE = {
    "empty": b"",
    "shorter than its length field": b"\x01\x02",
    "text": b"this is not a tensor file, it is a sentence",
    "zeros": bytes(64),
    "header cut": struct.pack("<Q", 500) + b"{}",
    "header not JSON": struct.pack("<Q", 4) + b"{{{{",
    "header not UTF-8": struct.pack("<Q", 2) + b"\xff\xfe",
    "entry without dtype": _with_header({"w": {"shape": [1], "data_offsets": [0, 4]}}),
    "entry without offsets": _with_header({"w": {"shape": [1], "dtype": "F32"}}),
    "entry not an object": _with_header({"w": 5}),
}


@pytest.mark.parametrize("what", sorted(GARBAGE))
def test_a_file_of_another_kind_is_a_checkpoint_error(tmp_path: Path, what: str) -> None:
    (tmp_path / "a").write_bytes(GARBAGE[what])
    with pytest.raises(CheckpointError, match="a"):
        read_header(LocalStore(tmp_path), "a")


@pytest.mark.parametrize("header", [[], 5, None, {"w": {"shape": [1], "dtype": "F32", "data_offsets": []}}])
def test_a_header_of_another_shape_is_a_checkpoint_error(tmp_path: Path, header: object) -> None:
    (tmp_path / "a").write_bytes(_with_header(header))
    with pytest.raises(CheckpointError):
        read_header(LocalStore(tmp_path), "a")


def test_the_cast_to_bfloat16_is_torchs_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    # Ties (lower half exactly 0x8000) above even and odd bits, and their neighbours.
    upper = rng.integers(0, 1 << 16, 20_000, dtype=np.uint64).astype(np.uint32) << 16
    ties = np.concatenate([upper | low for low in (0x7FFF, 0x8000, 0x8001)]).astype(np.uint32).view(np.float32)
    denormals = np.arange(0, 1 << 23, 997, dtype=np.uint32).view(np.float32)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 3.4028235e38, -3.4028235e38, 3.3895314e38], dtype=np.float32)
    values = np.concatenate([patterns, ties, denormals, -denormals, edges])
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)


def test_nan_stays_nan_in_bfloat16() -> None:
    bits = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], dtype=np.uint32)
    found = torch.from_numpy(to_bfloat16(bits.view(np.float32)).view(np.int16)).view(torch.bfloat16)
    assert torch.isnan(found).all()
