"""Slices of ranks written and read back by any range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_ft.checkpoint.manifest import Manifest, index_pieces, map_slices
from dist_ft.checkpoint.snapshot import HostCopies, SliceReader, write_slices
from dist_ft.errors import CheckpointError
from dist_ft.slices import ParamInfo, SliceKey, WrittenFile
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

DIRECTORY = "checkpoints/step-00000010-a0001"
NUMEL = 23


def _write(
    run_dir: Path, ranges: list[list[tuple[int, int]]], has_index: bool = True, store: LocalStore | None = None
) -> tuple[SliceReader, torch.Tensor]:
    """Writes `w`, whose elements are their indices, cut into the ranges [start, end) of each rank."""
    whole = torch.arange(NUMEL, dtype=torch.float32)
    files = tuple(
        write_slices(
            LocalStore(run_dir),
            f"{DIRECTORY}/slices-{rank}",
            [(SliceKey("other", rank, "fp32"), torch.full((9,), -1.0))]
            + [(SliceKey("w", start, "fp32"), whole[start:end]) for start, end in found],
        )
        for rank, found in enumerate(ranges)
    )
    params = (ParamInfo("w", (NUMEL,), "w"),)
    manifest = make_manifest(10, params=params, files=files)
    if has_index:
        slices = map_slices(LocalStore(run_dir), DIRECTORY, [file.name for file in files])
        manifest = replace(manifest, pieces=index_pieces(slices, files))
    return SliceReader(store or LocalStore(run_dir), Manifest.decode(manifest.encode())), whole


def test_a_slice_file_is_plain_safetensors(tmp_path: Path) -> None:
    write_slices(LocalStore(tmp_path), "a", [(SliceKey("m.w", 5, "exp_avg"), torch.ones(3))])
    assert torch.equal(load_file(tmp_path / "a")["m.w|5|exp_avg"], torch.ones(3))


def test_copies_keep_their_memory_for_the_next_ones() -> None:
    host, weights = HostCopies(), torch.arange(6.0)
    slices = [(SliceKey("w", 0, "fp32"), weights[:4]), (SliceKey("b", 0, "fp32"), weights[4:].bfloat16())]
    assert host.num_new_bytes(slices) == 4 * 6
    first = host.copy(slices)
    weights += 1
    assert [copy.tolist() for _, copy in first] == [[0, 1, 2, 3], [4, 5]]
    assert host.num_new_bytes(slices) == 0
    second = host.copy(slices)
    assert [copy.tolist() for _, copy in second] == [[1, 2, 3, 4], [4, 5]]
    assert [key for key, _ in second] == [key for key, _ in slices]
    assert [copy.data_ptr() for _, copy in second] == [copy.data_ptr() for _, copy in first]
    assert host.num_new_bytes(slices[:1]) == 4 * 4
    assert [copy.tolist() for _, copy in host.copy(slices[:1])] == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    "ranges", [[[(0, 23)]], [[(0, 10)], [(10, 23)]], [[(17, 23), (0, 1)], [(1, 2), (9, 17)], [(2, 9)]]]
)
@pytest.mark.parametrize("has_index", [True, False], ids=["with an index", "of before"])
def test_every_range_reads_back_whatever_the_pieces(
    tmp_path: Path, ranges: list[list[tuple[int, int]]], has_index: bool
) -> None:
    reader, whole = _write(tmp_path, ranges, has_index)
    expected_bytes = 0
    for start in range(NUMEL):
        for count in range(1, NUMEL - start + 1):
            assert torch.equal(reader(SliceKey("w", start, "fp32"), count), whole[start : start + count])
            expected_bytes += 4 * count
    assert reader.bytes_read == expected_bytes


class CountingStore(LocalStore):
    """A store that notes what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.ranges: list[tuple[str, int]] = []

    def read_range(self, name: str, start: int, length: int) -> bytes:
        self.ranges.append((Path(name).name, length))
        return super().read_range(name, start, length)


def test_a_rank_asks_the_store_for_its_own_bytes_and_for_no_header(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    reader, whole = _write(tmp_path, [[(0, 10)], [(10, 20)], [(20, 23)]], store=store)
    assert store.ranges == []
    assert torch.equal(reader(SliceKey("w", 8, "fp32"), 4), whole[8:12])
    assert store.ranges == [("slices-0", 8), ("slices-1", 8)]


def test_without_an_index_the_headers_of_all_files_are_read(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    _write(tmp_path, [[(0, 10)], [(10, 23)]], has_index=False, store=store)
    assert {name for name, _ in store.ranges} == {"slices-0", "slices-1"}


@pytest.mark.parametrize("text", ["9:0:23:88", "0:0:23", "a:b:c:d"])
def test_an_index_that_says_nothing_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    manifest = make_manifest(10, pieces={"w": {"fp32": text}}, files=(WrittenFile("slices-0", 1, ""),))
    reader = SliceReader(LocalStore(tmp_path), manifest)
    with pytest.raises(CheckpointError, match="is no piece of w"):
        reader(SliceKey("w", 0, "fp32"), 1)


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    square = torch.arange(16.0).reshape(4, 4)
    half = torch.tensor([1.0, 2.5], dtype=torch.bfloat16)
    write_slices(
        LocalStore(tmp_path),
        "a",
        [(SliceKey("t", 0, "fp32"), square.t().reshape(-1)[3:9]), (SliceKey("h", 0, "fp32"), half)],
    )
    found = load_file(tmp_path / "a")
    assert torch.equal(found["t|0|fp32"], square.t().reshape(-1)[3:9])
    assert torch.equal(found["h|0|fp32"], half.float())


def test_a_parameter_of_a_trained_model_can_be_written(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    write_slices(LocalStore(tmp_path), "a", [(SliceKey("p", 0, "fp32"), parameter)])
    assert torch.equal(load_file(tmp_path / "a")["p|0|fp32"], torch.ones(4))


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    reader, _ = _write(tmp_path, [[(0, NUMEL)]])
    reader(SliceKey("w", 0, "fp32"), 3).add_(1)  # a read-only buffer would warn or crash here
    assert torch.equal(reader(SliceKey("w", 0, "fp32"), 3), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("key", "count"),
    [
        (SliceKey("w", 20, "fp32"), 4),
        (SliceKey("w", NUMEL, "fp32"), 1),
        (SliceKey("w", 0, "exp_avg"), 1),
        (SliceKey("v", 0, "fp32"), 1),
    ],
)
def test_what_is_not_stored_is_a_checkpoint_error(tmp_path: Path, key: SliceKey, count: int) -> None:
    reader, _ = _write(tmp_path, [[(0, 10)], [(10, NUMEL)]])
    with pytest.raises(CheckpointError, match="are not in the checkpoint"):
        reader(key, count)


def test_a_missing_start_is_a_checkpoint_error(tmp_path: Path) -> None:
    reader, _ = _write(tmp_path, [[(0, 5)]])
    with pytest.raises(CheckpointError):
        reader(SliceKey("w", 6, "fp32"), 2)


@pytest.mark.parametrize(("start", "count"), [(5, 15), (10, 6), (12, 5)])
def test_a_gap_between_pieces_is_a_checkpoint_error(tmp_path: Path, start: int, count: int) -> None:
    reader, _ = _write(tmp_path, [[(0, 10)], [(15, NUMEL)]])
    with pytest.raises(CheckpointError):
        reader(SliceKey("w", start, "fp32"), count)


def test_a_truncated_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    reader, _ = _write(tmp_path, [[(0, NUMEL)]])
    path = tmp_path / DIRECTORY / "slices-0"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends at byte"):
        reader(SliceKey("w", 0, "fp32"), NUMEL)
