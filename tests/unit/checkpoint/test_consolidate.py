"""Slices of several ranks → plain safetensors files that the real library loads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dist_ft.checkpoint import consolidate as module
from dist_ft.checkpoint.consolidate import consolidate, plan_shards
from dist_ft.checkpoint.manifest import Manifest, read_slice_map
from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.checkpoint.tensorfile import read_header
from dist_ft.errors import CheckpointError, ExportError
from dist_ft.slices import STATE_KINDS, ParamInfo, SliceKey
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

PARAMS = (
    ParamInfo("base.a.weight", (7, 11), "a.weight"),
    ParamInfo("base.b.weight", (5, 3, 2), "b.weight"),
    ParamInfo("base.norm", (13,), "norm"),
    ParamInfo("base.scale", (), "scale"),
)


def _weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {param.name: torch.randn(param.shape, generator=generator) for param in PARAMS}


def _write(run_dir: Path, weights: dict[str, torch.Tensor], world_size: int, skip: int | None = None) -> Manifest:
    """Writes a checkpoint whose ranks hold uneven parts; rank `skip` leaves out one element."""
    rng = np.random.default_rng(world_size)
    slices: list[list[tuple[SliceKey, torch.Tensor]]] = [[] for _ in range(world_size)]
    for param in PARAMS:
        cuts = [0, *sorted(int(c) for c in rng.integers(0, param.numel + 1, world_size - 1)), param.numel]
        flat = weights[param.name].reshape(-1)
        for rank, (start, end) in enumerate(pairwise(cuts)):
            for kind in STATE_KINDS:
                state = flat if kind == "fp32" else torch.full_like(flat, 0.5)
                if start < end:
                    slices[rank].append((SliceKey(param.name, start, kind), state[start:end]))
    if skip is not None:
        key, tensor = slices[skip][0]
        slices[skip][0] = (key, tensor[:-1])
    directory = run_dir / "checkpoints/step-00000010-a0001"
    files = tuple(write_slices(LocalStore(directory), f"slices-{rank}", found) for rank, found in enumerate(slices))
    return make_manifest(10, params=PARAMS, world_size=world_size, files=files)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_file_holds_the_weights_of_all_ranks(tmp_path: Path, world_size: int) -> None:
    weights = _weights()
    manifest = _write(tmp_path, weights, world_size)
    (path,) = consolidate(LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype="float32")
    assert path == tmp_path / "out/model.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == {param.export_name for param in PARAMS}
    for param in PARAMS:
        assert torch.equal(loaded[param.export_name], weights[param.name])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_bfloat16_is_torchs_cast(tmp_path: Path) -> None:
    weights = _weights()
    manifest = _write(tmp_path, weights, 3)
    (path,) = consolidate(LocalStore(tmp_path), manifest, tmp_path, stem="adapter_model", dtype="bfloat16")
    loaded = load_file(path)
    for param in PARAMS:
        assert torch.equal(loaded[param.export_name], weights[param.name].bfloat16())


class _Counting(LocalStore):
    """Counts the bytes that are read by range."""

    num_bytes = 0

    def read_range(self, name: str, start: int, count: int) -> bytes:
        self.num_bytes += count
        return super().read_range(name, start, count)


def test_only_the_weights_themselves_are_read(tmp_path: Path) -> None:
    manifest = _write(tmp_path, _weights(), 2)
    store = _Counting(tmp_path)
    read_slice_map(store, manifest)
    of_headers, store.num_bytes = store.num_bytes, 0
    consolidate(store, manifest, tmp_path / "out", stem="adapter_model", dtype="bfloat16")
    assert store.num_bytes - of_headers == 4 * sum(param.numel for param in PARAMS)


def test_a_damaged_piece_is_an_error_of_the_reader_and_leaves_no_file(tmp_path: Path) -> None:
    manifest = _write(tmp_path, _weights(), 2)
    name = f"{manifest.directory}/{manifest.files[1].name}"
    first = min(entry.offset for entry in read_header(LocalStore(tmp_path), name).values())
    with (tmp_path / name).open("r+b") as file:
        file.truncate(first)
    with pytest.raises(CheckpointError, match="ends at byte"):
        consolidate(LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype="float32")
    assert [*(tmp_path / "out").iterdir()] == []


def test_chunks_smaller_than_a_slice_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights()
    manifest = _write(tmp_path, weights, 2)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3)
    (path,) = consolidate(LocalStore(tmp_path), manifest, tmp_path, stem="model", dtype="float32")
    loaded = load_file(path)
    assert all(torch.equal(loaded[param.export_name], weights[param.name]) for param in PARAMS)


def test_shards_and_their_index_hold_every_tensor_once(tmp_path: Path) -> None:
    weights = _weights()
    manifest = _write(tmp_path, weights, 2)
    paths = consolidate(
        LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype="float32", max_shard_bytes=150
    )
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {param.export_name for param in PARAMS}
    assert index["metadata"]["total_size"] == 4 * sum(param.numel for param in PARAMS)
    for param in PARAMS:
        loaded = load_file(tmp_path / "out" / index["weight_map"][param.export_name])
        assert torch.equal(loaded[param.export_name], weights[param.name])
    assert sum(len(load_file(path)) for path in paths) == len(PARAMS)


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "expected"),
    [
        ([4, 4], 16, [[4], [4]]),
        ([4, 4], 32, [[4, 4]]),
        ([100], 16, [[100]]),
        ([1, 100, 1], 16, [[1], [100], [1]]),
        ([1, 1, 1, 1, 1], 8, [[1, 1], [1, 1], [1]]),
    ],
)
def test_a_shard_is_as_large_as_allowed_or_one_tensor(
    sizes: list[int], max_bytes: int, expected: list[list[int]]
) -> None:
    params = [ParamInfo(f"p{i}", (size,), f"p{i}") for i, size in enumerate(sizes)]
    found = plan_shards(params, 4, max_bytes)
    assert [[param.numel for param in shard] for shard in found] == expected
    assert [param for shard in found for param in shard] == params


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite_is_not_exported(tmp_path: Path, value: float, dtype: str) -> None:
    weights = _weights()
    weights["base.norm"][-1] = value
    manifest = _write(tmp_path, weights, 2)
    with pytest.raises(ExportError, match=r"base\.norm"):
        consolidate(LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype=dtype)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_value_beyond_the_range_of_bfloat16_is_not_exported(tmp_path: Path) -> None:
    weights = _weights()
    weights["base.norm"][0] = 3.4e38
    manifest = _write(tmp_path, weights, 1)
    with pytest.raises(ExportError):
        consolidate(LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype="bfloat16")


def test_incomplete_slices_are_not_exported(tmp_path: Path) -> None:
    manifest = _write(tmp_path, _weights(), 2, skip=0)
    with pytest.raises(CheckpointError, match=r"base\.a\.weight"):
        consolidate(LocalStore(tmp_path), manifest, tmp_path / "out", stem="model", dtype="float32")
    assert not (tmp_path / "out").exists()
