"""Slices of ranks written and read back by any range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_ft.checkpoint.manifest import Fingerprint, Manifest
from dist_ft.checkpoint.snapshot import SliceReader, write_slices
from dist_ft.errors import CheckpointError
from dist_ft.slices import Cursor, ParamInfo, SliceKey
from dist_ft.storage.store import LocalStore

DIRECTORY = "checkpoints/step-00000010-a0001"
NUMEL = 23


def _write(run_dir: Path, ranges: list[list[tuple[int, int]]]) -> tuple[SliceReader, torch.Tensor]:
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
    mark = Fingerprint("m", "d", 0, "full", 8)
    params = (ParamInfo("w", (NUMEL,), "w"),)
    manifest = Manifest("run", 1, 10, Cursor(0, 80), 2, 2, 10, mark, params, [], {}, files, {}, {}, None)
    return SliceReader(LocalStore(run_dir), manifest), whole


def test_a_slice_file_is_plain_safetensors(tmp_path: Path) -> None:
    write_slices(LocalStore(tmp_path), "a", [(SliceKey("m.w", 5, "exp_avg"), torch.ones(3))])
    assert torch.equal(load_file(tmp_path / "a")["m.w|5|exp_avg"], torch.ones(3))


@pytest.mark.parametrize(
    "ranges", [[[(0, 23)]], [[(0, 10)], [(10, 23)]], [[(17, 23), (0, 1)], [(1, 2), (9, 17)], [(2, 9)]]]
)
def test_every_range_reads_back_whatever_the_pieces(tmp_path: Path, ranges: list[list[tuple[int, int]]]) -> None:
    reader, whole = _write(tmp_path, ranges)
    expected_bytes = 0
    for start in range(NUMEL):
        for count in range(1, NUMEL - start + 1):
            assert torch.equal(reader(SliceKey("w", start, "fp32"), count), whole[start : start + count])
            expected_bytes += 4 * count
    assert reader.bytes_read == expected_bytes


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
