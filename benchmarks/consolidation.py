#!/usr/bin/env python3
"""Slices of 8 ranks → one model in safetensors: time and peak memory, beside a plain copy and DeepSpeed's tools.

    python benchmarks/consolidation.py [--params 1e9] [--rounds 3] [--directory DIR] [--json FILE]

The weights are random. They lie twice on the disk: as slices of a checkpoint of dist-ft, and as a ZeRO-3 checkpoint of
8 ranks of DeepSpeed, cut alike; both hold float32 masters only. Sides, in turns, each in a process of its own:

- `dist-ft`: `checkpoint.consolidate`, which also checks that all values are finite and hashes what it writes.
- `copy`: the bytes of the slices read in parts of 8 MiB, and as many bytes as the result has written to one file. It is
  what the disk and the page cache give; one thread, no checks.
- `deepspeed`: `zero_to_fp32` and `zero_to_torch` with safetensors.

Everyone's time is from the first read until all files are on the disk (fsync; DeepSpeed's files are synced after it),
without imports. The source files are in the page cache, as far as memory goes. Peak memory is `VmHWM` of the process,
imports included. All tensors of dist-ft and DeepSpeed are compared bit by bit once. Needs 5 bytes of disk for each byte
of the float32 model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_ft.slices import ParamInfo

WORLD_SIZE = 8
DTYPES = {"float32": 4, "bfloat16": 2}
SIDES = ("dist-ft", "copy", "deepspeed")
_COPY_BYTES = 8 << 20
_RUN, _ZERO, _OUT = "run", "zero3", "out"


def make_params(num_elements: int) -> list[ParamInfo]:
    """Return parameters as a Llama of at least this many elements has them."""
    hidden = 2048
    layer = [
        ("q", (hidden, hidden)), ("k", (512, hidden)), ("v", (512, hidden)), ("o", (hidden, hidden)),
        ("up", (8191, hidden)), ("gate", (8191, hidden)), ("down", (hidden, 8191)), ("norm", (hidden,)),
    ]  # fmt: skip
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (min(128_256, num_elements // hidden // 4), hidden))]
    used = shapes[0][1][0] * hidden
    number = 0
    while used < num_elements:
        shapes += [(f"layers.{number}.{name}", shape) for name, shape in layer]
        used += sum(ParamInfo("", shape, "").numel for _, shape in layer)
        number += 1
    return [ParamInfo(name, shape, name, state=()) for name, shape in shapes]


def write_sources(params: list[ParamInfo], directory: Path) -> None:
    """Write the checkpoint of dist-ft and that of DeepSpeed, rank by rank."""
    import numpy as np
    import torch

    from dist_ft.checkpoint.snapshot import write_slices
    from dist_ft.slices import SliceKey
    from dist_ft.storage.store import LocalStore

    store = LocalStore(directory / _RUN)
    zero = directory / _ZERO / "global_step1"
    zero.mkdir(parents=True)
    (zero.parent / "latest").write_text("global_step1")
    files = []
    for rank in range(WORLD_SIZE):
        rng = np.random.default_rng(rank)
        slices, parts = [], []
        for param in params:
            length = -(-param.numel // WORLD_SIZE)  # as ZeRO-3 cuts it, with padding at the end
            part = torch.from_numpy(rng.standard_normal(length, dtype=np.float32))
            start = rank * length
            slices.append((SliceKey(param.name, start, "fp32"), part[: param.numel - start]))
            parts.append(part)
        name = f"slices-{rank:05d}-of-{WORLD_SIZE:05d}.safetensors"
        files.append(vars(write_slices(store, f"checkpoints/step-00000001-a0001/{name}", slices)))
        shapes = {param.name: torch.Size(param.shape) for param in params}
        model: dict[str, Any] = {
            "buffer_names": [], "module": {}, "param_shapes": [shapes], "shared_params": {}, "ds_version": "0.19.8",
            "frozen_param_shapes": None, "frozen_param_fragments": None,
        }  # fmt: skip
        torch.save(model, zero / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {"zero_stage": 3, "partition_count": WORLD_SIZE, "fp32_flat_groups": [torch.cat(parts)]}
        torch.save({"optimizer_state_dict": state}, zero / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (directory / "files.json").write_text(json.dumps(files))


def run_dist_ft(directory: Path, dtype: str, params: list[ParamInfo]) -> float:
    """Consolidate and return the seconds."""
    from dist_ft.checkpoint.consolidate import consolidate
    from dist_ft.checkpoint.manifest import Manifest
    from dist_ft.slices import Cursor, Environment, Fingerprint, Probe, WrittenFile
    from dist_ft.storage.store import LocalStore

    files = tuple(WrittenFile(**file) for file in json.loads((directory / "files.json").read_text()))
    manifest = Manifest(
        run_id="bench", attempt=1, step=1, cursor=Cursor(0, 1), world_size=WORLD_SIZE, zero_stage=3, optimizer_step=1,
        fingerprint=Fingerprint("", "", 0, "", 1), params=tuple(params), groups=(), schedule={}, files=files,
        probe=Probe((), (), ()), environment=Environment({}, 1, 1, "", ""), wandb_id=None,
    )  # fmt: skip
    began = time.perf_counter()
    consolidate(LocalStore(directory / _RUN), manifest, directory / _OUT, stem="model", dtype=dtype)
    return time.perf_counter() - began


def run_copy(directory: Path, dtype: str, params: list[ParamInfo]) -> float:
    """Read all slices and write as many bytes as the result has; return the seconds."""
    out = directory / _OUT
    out.mkdir()
    began = time.perf_counter()
    with (out / "copy").open("wb") as target:
        for path in sorted((directory / _RUN).rglob("slices-*")):
            with path.open("rb") as source:
                while part := source.read(_COPY_BYTES):
                    target.write(memoryview(part)[: len(part) * DTYPES[dtype] // 4])
        target.flush()
        os.fsync(target.fileno())
    return time.perf_counter() - began


def run_deepspeed(directory: Path, dtype: str, params: list[ParamInfo]) -> float:
    """Run the tool of DeepSpeed and return the seconds."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    began = time.perf_counter()
    convert_zero_checkpoint_to_state_dict(
        str(directory / _ZERO), str(directory / _OUT), dtype=dtype, max_shard_size="5GB", safe_serialization=True
    )
    for path in (directory / _OUT).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - began


def peak_memory_mib() -> float:
    """Return the most memory that this process has held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def tensors(directory: Path) -> dict[str, tuple[Path, Any]]:
    """Return file and header entry of each tensor in the safetensors files of a directory."""
    from dist_ft.checkpoint.tensorfile import read_header
    from dist_ft.storage.store import LocalStore

    store = LocalStore(directory)
    names = [path.name for path in directory.glob("*.safetensors")]
    return {key: (directory / name, entry) for name in names for key, entry in read_header(store, name).items()}


def are_equal(mine: Path, theirs: Path, dtype: str) -> bool:
    """Compare all tensors of two directories bit by bit."""

    def parts(path: Path, entry: Any) -> Iterator[bytes]:
        end = entry.offset + entry.numel * DTYPES[dtype]
        with path.open("rb") as file:
            for start in range(entry.offset, end, _COPY_BYTES):
                yield os.pread(file.fileno(), min(_COPY_BYTES, end - start), start)

    ours, others = tensors(mine), tensors(theirs)
    return ours.keys() == others.keys() and all(
        a == b for key in ours for a, b in zip(parts(*ours[key]), parts(*others[key]), strict=True)
    )


def in_process(side: str, dtype: str, directory: Path, num_elements: int) -> dict[str, float]:
    """Run one side in a process of its own."""
    shutil.rmtree(directory / _OUT, ignore_errors=True)
    os.sync()  # nobody pays for what the one before left to write
    command = [sys.executable, __file__, "--side", side, "--dtype", dtype, "--directory", str(directory)]
    env = {**os.environ, "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--params", str(num_elements)], capture_output=True, text=True, check=False, env=env
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(dtype: str, rounds: int, directory: Path, num_elements: int) -> dict[str, Any]:
    """Run the sides in turns and return medians, ratios to the copy, and whether the results are equal."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, float] = dict.fromkeys(SIDES, 0.0)
    kept = directory / "kept"
    is_equal = None
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else reversed(SIDES):
            found = in_process(side, dtype, directory, num_elements)
            seconds[side].append(found["seconds"])
            memory[side] = max(memory[side], found["peak_mib"])
            if number == 0 and side == "dist-ft":
                shutil.rmtree(kept, ignore_errors=True)
                (directory / _OUT).rename(kept)
            if number == 0 and side == "deepspeed":
                is_equal = are_equal(kept, directory / _OUT, dtype)
                shutil.rmtree(kept)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "dtype": dtype,
        "seconds": {side: round(value, 2) for side, value in medians.items()},
        "range": {side: [round(min(values), 2), round(max(values), 2)] for side, values in seconds.items()},
        "rate_of_the_copy": {side: round(medians["copy"] / medians[side], 2) for side in ("dist-ft", "deepspeed")},
        "peak_mib": {side: round(value, 1) for side, value in memory.items()},
        "is_equal": is_equal,
    }


def main() -> None:
    """Run both dtypes and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=1e9, help="elements of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the files go; default is a temporary directory")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    params = make_params(int(options.params))
    if options.side is not None:
        run = {"dist-ft": run_dist_ft, "copy": run_copy, "deepspeed": run_deepspeed}[options.side]
        seconds = run(options.directory, options.dtype, params)
        print(json.dumps({"seconds": seconds, "peak_mib": peak_memory_mib()}))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="dist-ft-consolidation-", dir=options.directory) as name:
        write_sources(params, Path(name))
        print(
            f"{sum(param.numel for param in params):,} elements, {len(params)} tensors, {WORLD_SIZE} ranks", flush=True
        )
        for dtype in DTYPES:
            results.append(compare(dtype, options.rounds, Path(name), int(options.params)))
            print(json.dumps(results[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
