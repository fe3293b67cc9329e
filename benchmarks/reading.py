"""Reading prepared data, side by side: dist-ft, mosaicml-streaming and LitData, where these are installed.

    python benchmarks/reading.py [--sequences 50000] [--tokens 512] [--rounds 3]

Each side writes the same sequences in its own format and reads them shuffled in one process, in batches of 32 int64
rows; then a new reader resumes in the middle of the epoch. Sides run in processes of their own and alternate. Imports,
process start and writing are not counted; the files are in the page cache. Prints a Markdown table, and last what
dist-ft's order takes at a billion sequences.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

BATCH = 32
SHARD_SEQUENCES = 8_000
SIDES = {"dist-ft": "dist_ft", "mosaicml-streaming": "streaming", "litdata": "litdata"}


def sequences(count: int, tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the same sequences on every side."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "input_ids": rng.integers(0, 50_000, tokens, dtype=np.int32),
            "trained": (rng.random(tokens) < 0.5).astype(np.uint8),
        }


def batches_of(samples: Iterator[Any]) -> Iterator[np.ndarray]:
    """Stacks inputs and targets of a batch, as dist-ft's loader does."""
    rows = []
    for sample in samples:
        ids, trained = np.asarray(sample["input_ids"]), np.asarray(sample["trained"])
        rows.append((ids.astype(np.int64), np.where(trained[1:], ids[1:], -100).astype(np.int64)))
        if len(rows) == BATCH:
            yield np.stack([ids for ids, _ in rows])
            np.stack([targets for _, targets in rows])
            rows = []


def write_ours(directory: Path, count: int, tokens: int) -> None:
    from dist_ft.data.shards.counts import Counts
    from dist_ft.data.shards.pack import PackedSequence
    from dist_ft.data.shards.shard_file import ShardWriter

    rows = sequences(count, tokens)
    for shard in range(-(-count // SHARD_SEQUENCES)):
        size = min(SHARD_SEQUENCES, count - shard * SHARD_SEQUENCES)
        with ShardWriter(directory, f"s{shard:03d}") as writer:
            for _ in range(size):
                row = next(rows)
                writer.add([PackedSequence(row["input_ids"].tolist(), row["trained"].astype(bool).tolist(), [0])])
            writer.close(Counts(num_rows=size))


def read_ours(directory: Path, count: int, begin: int) -> Iterator[np.ndarray]:
    from dist_ft.config.data_sections import LoaderConfig
    from dist_ft.data.stream.cache import Replica, ShardCache
    from dist_ft.data.stream.loader import RankLayout, TrainLoader
    from dist_ft.data.stream.order import Order
    from dist_ft.data.stream.token_shards import TokenShards
    from dist_ft.storage.store import LocalStore

    keys = sorted(path.stem for path in directory.glob("*.json"))
    files = ShardCache([Replica(str(directory), LocalStore(directory))], LoaderConfig())
    sizes = np.array([files.info(key).counts.num_sequences for key in keys])
    loader = TrainLoader(
        Order([sizes], None, 0), [TokenShards(keys, files, sizes)], RankLayout(0, 1, BATCH), BATCH, count, 2
    )
    for step in range(begin // BATCH, count // BATCH):
        yield loader.step(step).micro_batches[0].input_ids
    loader.close()


def write_streaming(directory: Path, count: int, tokens: int) -> None:
    from streaming import MDSWriter

    columns = {"input_ids": f"ndarray:int32:{tokens}", "trained": f"ndarray:uint8:{tokens}"}
    with MDSWriter(out=str(directory), columns=columns, size_limit=1 << 25) as writer:
        for row in sequences(count, tokens):
            writer.write(row)


def read_streaming(directory: Path, count: int, begin: int) -> Iterator[np.ndarray]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(directory), shuffle=True, batch_size=BATCH)
    if begin:
        data.load_state_dict(data.state_dict(begin, from_beginning=True))
    yield from batches_of(iter(data))


def write_litdata(directory: Path, count: int, tokens: int) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(directory), chunk_bytes=1 << 25)
    for index, row in enumerate(sequences(count, tokens)):
        writer[index] = row
    writer.done()
    writer.merge()


def read_litdata(directory: Path, count: int, begin: int) -> Iterator[np.ndarray]:
    from litdata import StreamingDataset

    data = StreamingDataset(str(directory), shuffle=True, drop_last=False)
    if begin:
        data.load_state_dict(data.state_dict(begin, num_workers=1, batch_size=BATCH))
    yield from batches_of(iter(data))


Writer = Callable[[Path, int, int], None]
Reader = Callable[[Path, int, int], Iterator[np.ndarray]]
WRITERS: dict[str, Writer] = {"dist-ft": write_ours, "mosaicml-streaming": write_streaming, "litdata": write_litdata}
READERS: dict[str, Reader] = {"dist-ft": read_ours, "mosaicml-streaming": read_streaming, "litdata": read_litdata}


def measure(side: str, directory: Path, count: int) -> dict[str, float]:
    """Read an epoch, then resume in its middle."""
    next(READERS[side](directory, count, 0))  # imports, page cache
    began, cpu_began = time.perf_counter(), time.process_time()
    rows = sum(len(batch) for batch in READERS[side](directory, count, 0))
    per_s, per_cpu_s = rows / (time.perf_counter() - began), rows / (time.process_time() - cpu_began)
    began = time.perf_counter()
    next(READERS[side](directory, count, count // 2 // BATCH * BATCH))
    return {"per_s": per_s, "per_cpu_s": per_cpu_s, "resume_ms": 1000 * (time.perf_counter() - began)}


def measure_order() -> str:
    """Says what a billion sequences cost: opening in the middle, and positions a second."""
    from dist_ft.data.stream.order import Order

    sizes, opened = np.full(125_000, 8_000), []
    for seed in range(15):
        began = time.thread_time()
        order = Order([sizes], None, seed)
        order.at(500_000_000)
        opened.append(time.thread_time() - began)
    began = time.thread_time()
    order.locate(np.arange(500_000_000, 502_000_000))
    rate = 2 / (time.thread_time() - began)
    return f"1e9 sequences: opened in {1000 * median(opened):.1f} ms of CPU, {rate:.2f} million positions/s of CPU"


def run_side(*arguments: str) -> dict[str, float]:
    """Run this file in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=1200, check=False
    )
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if not any(options.directory.iterdir()):
            WRITERS[options.side](options.directory, options.sequences, options.tokens)
        print(json.dumps(measure(options.side, options.directory, options.sequences)))
        return
    sides = [side for side, package in SIDES.items() if importlib.util.find_spec(package)]
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for round_index in range(options.rounds + 1):  # the first one writes
            for side in sides:
                directory = Path(scratch) / side
                directory.mkdir(exist_ok=True)
                sized = ["--sequences", str(options.sequences), "--tokens", str(options.tokens)]
                found = run_side("--side", side, "--directory", str(directory), *sized)
                if round_index:
                    results[side].append(found)
    print(f"{options.sequences} sequences of {options.tokens} tokens, median of {options.rounds}\n")
    print(
        "| | sequences/s | sequences per second of CPU | first batch after a resume in mid-epoch |\n|---|---|---|---|"
    )
    for side in sides:
        keys = ("per_s", "per_cpu_s", "resume_ms")
        per_s, per_cpu_s, resume = (median(result[key] for result in results[side]) for key in keys)
        print(f"| {side} | {per_s:,.0f} | {per_cpu_s:,.0f} | {resume:.1f} ms |")
    for side in SIDES.keys() - set(sides):
        print(f"\n{side} is not installed here.")
    print(f"\n{measure_order()}")


if __name__ == "__main__":
    main()
