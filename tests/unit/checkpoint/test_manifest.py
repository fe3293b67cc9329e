"""Manifests: what they say survives, what they must not name is refused, damage is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint.manifest import (
    Manifest,
    SliceMap,
    SlicePiece,
    check_coverage,
    map_slices,
    read_manifests,
    seal,
    verify_files,
)
from dist_ft.checkpoint.snapshot import write_slices
from dist_ft.checkpoint.tensorfile import write_tensors
from dist_ft.errors import CheckpointError
from dist_ft.slices import STATE_KINDS, Cursor, Environment, Fingerprint, ParamInfo, Probe, SliceKey, WrittenFile
from dist_ft.storage.store import LocalStore

GOLDEN = Path(__file__).parent / "golden" / "manifest.json"
"""Written by the commit before the piece index."""


def _manifest(**changes: Any) -> Manifest:
    whole = Manifest(
        run_id="run",
        attempt=3,
        step=40,
        cursor=Cursor(1, 320),
        world_size=2,
        zero_stage=2,
        optimizer_step=40,
        fingerprint=Fingerprint("m", "d", 7, "kind=full", 8),
        params=(ParamInfo("model.w", (3, 5), "w"), ParamInfo("model.β", (), "β")),
        groups=({"lr": 1e-4, "initial_lr": 2e-4, "weight_decay": 0.1, "betas": [0.9, 0.999], "eps": 1e-8},),
        schedule={"kind": "cosine", "max_steps": 60},
        files=(WrittenFile("slices-00000-of-00001.safetensors", 123, "0" * 32),),
        probe=Probe((1,), (0,), ((0.1,),)),
        environment=Environment({"torch": "2"}, 2, 1, "x86_64", "cpu"),
        wandb_id=None,
    )
    return replace(whole, **changes)


def _edited(edit: Callable[[dict[str, Any]], object]) -> bytes:
    raw = json.loads(_manifest().encode())
    edit(raw)
    raw.pop("xxh3")
    return json.dumps({**raw, "xxh3": seal(raw)}).encode()


def test_a_manifest_survives_its_bytes() -> None:
    assert Manifest.decode(_manifest().encode()) == _manifest()


def test_a_manifest_with_a_piece_index_survives_its_bytes() -> None:
    manifest = _manifest(pieces={"model.w": {"fp32": "0:0:15:320"}})
    assert Manifest.decode(manifest.encode()) == manifest


def test_a_manifest_of_before_is_written_as_it_was() -> None:
    data = GOLDEN.read_bytes()
    manifest = Manifest.decode(data)
    assert manifest.encode() == data
    assert (manifest.pieces, manifest.environment.device, manifest.probe.columns) == (None, "cpu", (0, 5))
    assert manifest.groups[0]["betas"] == [0.9, 0.999]


def test_the_directory_follows_from_step_and_attempt() -> None:
    assert _manifest().directory == "checkpoints/step-00000040-a0003"


@pytest.mark.parametrize("name", ["../x", "/abs", "", "a/b", ".", "..", "a/../b", "./a", "a/"])
def test_a_file_name_that_is_not_plain_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Manifest.decode(_manifest(files=(WrittenFile(name, 1, "0"),)).encode())


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused(version: object) -> None:
    with pytest.raises(CheckpointError, match="format 1"):
        Manifest.decode(_edited(lambda raw: raw.update(format_version=version)))


GARBAGE = {
    "empty": b"",
    "zeros": bytes(100),
    "cut": _manifest().encode()[:200],
    "not UTF-8": b"\xff\xfe{}",
    "an empty object": b"{}",
    "a list": b"[]",
    "a field too many": _edited(lambda raw: raw.update(more=1)),
    "a field too few": _edited(lambda raw: raw.pop("step")),
    "files not a list": _edited(lambda raw: raw.update(files=3)),
    "a file without a hash": _edited(lambda raw: raw["files"][0].pop("xxh3")),
    "a parameter without a shape": _edited(lambda raw: raw["params"][0].pop("shape")),
    "no cursor": _edited(lambda raw: raw.update(cursor=None)),
    "an index that is none": _edited(lambda raw: raw.update(pieces=[1])),
}


@pytest.mark.parametrize("what", sorted(GARBAGE))
def test_garbage_is_a_checkpoint_error(what: str) -> None:
    with pytest.raises(CheckpointError):
        Manifest.decode(GARBAGE[what])


@pytest.mark.parametrize("data", [b"null", b"5", b'"text"'])
def test_json_that_is_no_object_is_a_checkpoint_error(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.decode(data)


def test_fingermarkdifferences_name_the_field_and_both_values() -> None:
    one = _manifest().fingerprint
    assert one.differences(one) == []
    assert one.differences(replace(one, seed=8)) == ["seed: checkpoint 7, config 8"]


def test_another_objective_is_told_apart_and_sft_is_what_older_manifests_mean() -> None:
    sft = _manifest()
    other = replace(sft, fingerprint=replace(sft.fingerprint, objective="dpo"))
    assert Manifest.decode(other.encode()) == other
    assert "objective" not in json.loads(sft.encode())["fingerprint"]
    assert sft.fingerprint.differences(other.fingerprint) == ["objective: checkpoint sft, config dpo"]


@pytest.mark.parametrize("key", ["step", "optimizer_step", "world_size", "attempt"])
def test_a_changed_number_is_damage(key: str) -> None:
    raw = json.loads(_manifest().encode())
    raw[key] += 1
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.decode(json.dumps(raw).encode())


def test_changed_conditions_are_named_with_both_values() -> None:
    one = _manifest()
    assert one.changed_conditions(2, 2, one.environment) == []
    assert one.changed_conditions(3, 2, replace(one.environment, versions={"torch": "3"})) == [
        "workers: 2 → 3",
        "torch: 2 → 3",
    ]


PARAMS = (ParamInfo("w", (2, 5), "w"), ParamInfo("b", (3,), "b"))


def _slices(changes: dict[tuple[str, str], list[tuple[int, int]]]) -> SliceMap:
    whole = {(p.name, kind): [(0, 2), (2, p.numel - 2)] for p in PARAMS for kind in STATE_KINDS} | changes
    return {
        key: [SlicePiece(start, count, "f", 0) for start, count in ranges] for key, ranges in whole.items() if ranges
    }


WHOLE: dict[str, dict[tuple[str, str], list[tuple[int, int]]]] = {
    "as they are": {},
    "in one piece": {("w", "fp32"): [(0, 10)]},
    "in pieces of one": {("w", "exp_avg"): [(i, 1) for i in range(10)]},
}

BROKEN: dict[str, tuple[dict[tuple[str, str], list[tuple[int, int]]], str]] = {
    "nothing of it": ({("b", "fp32"): []}, r"b \(fp32\): elements 0..2 are missing"),
    "no second moment": ({("w", "exp_avg_sq"): []}, r"w \(exp_avg_sq\): elements 0..9 are missing"),
    "the start": ({("w", "fp32"): [(1, 9)]}, r"elements 0..0 are missing"),
    "the end": ({("w", "fp32"): [(0, 9)]}, r"elements 9..9 are missing"),
    "the middle": ({("w", "fp32"): [(0, 4), (6, 4)]}, r"elements 4..5 are missing"),
    "one twice": ({("w", "fp32"): [(0, 5), (4, 6)]}, r"elements 4..4 are stored twice"),
    "all twice": ({("b", "exp_avg"): [(0, 3), (0, 3)]}, r"elements 0..2 are stored twice"),
    "one inside another": ({("w", "fp32"): [(0, 10), (3, 2)]}, r"elements 3..4 are stored twice"),
    "beyond the end": ({("b", "fp32"): [(0, 4)]}, r"4 elements stored of 3"),
    "an unknown parameter": ({("v", "fp32"): [(0, 1)]}, r"slices of v \(fp32\), which is not a trained"),
    "an unknown kind": ({("w", "step"): [(0, 1)]}, r"slices of w \(step\), which is not a trained"),
}


@pytest.mark.parametrize("what", sorted(WHOLE))
def test_elements_that_are_stored_once_pass(what: str) -> None:
    check_coverage(PARAMS, _slices(WHOLE[what]))


@pytest.mark.parametrize("what", sorted(BROKEN))
def test_elements_missing_doubled_or_unknown_are_named(what: str) -> None:
    changes, message = BROKEN[what]
    with pytest.raises(CheckpointError, match=message):
        check_coverage(PARAMS, _slices(changes))


def test_slices_are_found_through_the_headers_of_all_files(tmp_path: Path) -> None:
    for rank, (start, count) in enumerate([(3, 2), (0, 3)]):
        write_slices(LocalStore(tmp_path), f"c/f{rank}", [(SliceKey("a|b", start, "fp32"), torch.ones(count))])
    found = map_slices(LocalStore(tmp_path), "c", ["f0", "f1"])
    pieces = [(piece.start, piece.count, piece.file) for piece in found["a|b", "fp32"]]
    assert pieces == [(0, 3, "c/f1"), (3, 2, "c/f0")]


@pytest.mark.parametrize("name", ["weight", "w|x|fp32", "w|0|other"])
def test_a_tensor_that_is_no_slice_is_a_checkpoint_error(tmp_path: Path, name: str) -> None:
    write_tensors(LocalStore(tmp_path), "c/f", [(name, "F32", (1,))], [bytes(4)])
    with pytest.raises(CheckpointError):
        map_slices(LocalStore(tmp_path), "c", ["f"])


@pytest.fixture
def stored(tmp_path: Path) -> tuple[LocalStore, Manifest, Path]:
    """A checkpoint of two files; the path is that of the second."""
    manifest = _manifest()
    directory = tmp_path / manifest.directory
    files = [
        write_slices(LocalStore(directory), f"slices-{rank}", [(SliceKey("w", rank, "fp32"), torch.randn(1000))])
        for rank in range(2)
    ]
    manifest = replace(manifest, files=tuple(files))
    store = LocalStore(tmp_path)
    assert store.create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())
    return store, manifest, directory / "slices-1"


def test_untouched_files_are_whole(stored: tuple[LocalStore, Manifest, Path]) -> None:
    store, manifest, _ = stored
    verify_files(store, manifest)


@pytest.mark.parametrize("where", [0, 8, 20, 500, -1])
def test_one_flipped_bit_is_found(stored: tuple[LocalStore, Manifest, Path], where: int) -> None:
    store, manifest, path = stored
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="slices-1 is damaged"):
        verify_files(store, manifest)


@pytest.mark.parametrize("keep", [0, 1, 4000])
def test_a_truncated_file_is_found(stored: tuple[LocalStore, Manifest, Path], keep: int) -> None:
    store, manifest, path = stored
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="slices-1"):
        verify_files(store, manifest)


def test_a_removed_file_is_found(stored: tuple[LocalStore, Manifest, Path]) -> None:
    store, manifest, path = stored
    path.unlink()
    with pytest.raises(CheckpointError, match="slices-1 is missing"):
        verify_files(store, manifest)


def test_a_file_that_has_grown_is_found(stored: tuple[LocalStore, Manifest, Path]) -> None:
    store, manifest, path = stored
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError):
        verify_files(store, manifest)


def test_a_file_that_cannot_be_read_counts_as_damaged(stored: tuple[LocalStore, Manifest, Path]) -> None:
    store, manifest, path = stored
    path.unlink()
    path.mkdir()  # reading it is an OSError, as it is on a failing disk
    with pytest.raises(CheckpointError):
        verify_files(store, manifest)


def test_a_link_out_of_the_run_directory_is_refused(
    stored: tuple[LocalStore, Manifest, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store, manifest, path = stored
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "slices"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(CheckpointError):
        verify_files(store, manifest)


def test_only_checkpoints_with_a_readable_manifest_are_read(
    stored: tuple[LocalStore, Manifest, Path], tmp_path: Path
) -> None:
    store, manifest, _ = stored
    store.create_exclusive("checkpoints/step-00000050-a0003/manifest.json", b"{")
    (tmp_path / "checkpoints/step-00000060-a0003").mkdir()
    assert [m.step for m in read_manifests(store)] == [manifest.step]


def test_a_copied_checkpoint_folder_counts_once(
    stored: tuple[LocalStore, Manifest, Path],
) -> None:
    store, manifest, _ = stored
    store.create_exclusive("checkpoints/backup/manifest.json", manifest.encode())
    assert len(list(read_manifests(store))) == 1


def test_adamw_is_written_as_before_there_were_other_optimizers() -> None:
    raw = json.loads(_manifest().encode())
    assert "optimizer" not in raw["fingerprint"]
    assert "optimizer_numbers" not in raw
    assert {frozenset(param) for param in raw["params"]} == {frozenset({"name", "shape", "export_name"})}


def test_another_optimizer_is_kept_and_told_apart() -> None:
    other = _manifest(
        fingerprint=Fingerprint("m", "d", 7, "kind=full", 8, optimizer="lion"),
        params=(ParamInfo("w", (3, 5), "w", ("exp_avg",)),),
        optimizer_numbers={"weight_sum": 0.1 + 0.2},
    )
    assert Manifest.decode(other.encode()) == other
    assert _manifest().fingerprint.differences(other.fingerprint) == ["optimizer: checkpoint adamw, config lion"]


def test_coverage_follows_the_optimizer_of_each_parameter() -> None:
    params = (ParamInfo("w", (2, 5), "w", ("exp_avg",)),)
    pieces = {("w", kind): [SlicePiece(0, 10, "f", 0)] for kind in ("fp32", "exp_avg")}
    check_coverage(params, pieces)
    with pytest.raises(CheckpointError, match=r"slices of w \(exp_avg_sq\), which is not a trained"):
        check_coverage(params, {**pieces, ("w", "exp_avg_sq"): [SlicePiece(0, 10, "f", 0)]})
    with pytest.raises(CheckpointError, match=r"w \(exp_avg\): elements 0..9 are missing"):
        check_coverage(params, {("w", "fp32"): pieces["w", "fp32"]})
