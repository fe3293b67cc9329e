"""How fast chat rows become packed sequences, beside `datasets.map(num_proc=cores)` and TRL's packing.

Both read the same JSONL file, render the same template with the same tokenizer, mark the assistant's tokens, pack to
the same length and write Arrow files, with one process a core. Ours checks every row and every rendering besides.
The text is from Python's own documentation. Reports medians over the repeats, and the peak memory of our worker
processes at one and ten times the data.

    python benchmarks/preparation.py [--rows 20000] [--repeats 3] [--cores N] [--model smollm2-135m-instruct]

TRL is no dependency of the project: `pip install --no-deps --target /tmp/trl trl`, then `PYTHONPATH=/tmp/trl`.
Without it only ours is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute
from transformers import AutoTokenizer

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import scan_part
from dist_ft.data.shards.make import render_rows
from dist_ft.data.shards.pack import Window
from dist_ft.data.shards.request import WINDOW_ROWS
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import Part, cut_parts
from dist_ft.model.chat.render import Renderer
from dist_ft.model.embedded import materialise
from dist_ft.records import Sample

MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
"""ChatML with the marks that TRL needs to find the assistant's tokens; the text is the same."""


@dataclass(frozen=True)
class Outcome:
    """One preparation."""

    seconds: float
    cpu_s: float
    num_sequences: int
    num_tokens: int
    peak_mib: float = 0.0


def make_rows(path: Path, num_rows: int) -> None:
    """Write conversations of one to three exchanges, of log-normal lengths."""
    rng = random.Random(0)
    corpus = " ".join(topics[name] for name in sorted(topics))

    def text(median: float, spread: float) -> str:
        length = min(int(rng.lognormvariate(median, spread)) + 8, 12_000)
        start = rng.randrange(len(corpus) - length)
        return corpus[start : start + length].strip()

    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            turns = [{"role": "system", "content": text(4, 0.5)}] if rng.random() < 0.3 else []
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                turns.append({"role": "user", "content": text(5, 0.8)})
                turns.append({"role": "assistant", "content": text(6, 1.0)})
            file.write(json.dumps({"messages": turns}) + "\n")


def tokenizer_of(model: str) -> Any:
    """Return the tokenizer with ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(materialise(model))
    tokenizer.chat_template = MARKED_CHATML
    return tokenizer


@lru_cache(maxsize=1)
def renderer_of(model: str) -> Renderer:
    """Once a process: a task of a run finds it there, too."""
    return Renderer(tokenizer_of(model))


def prepare_part(task: tuple[int, Part], source: RowSource, model: str, seq_len: int, folder: Path) -> tuple[int, ...]:
    """Prepare one part as a task of a run does; return sequences, tokens and the peak of this process in KiB."""
    number, part = task
    num_sequences = num_tokens = 0
    rows = render_rows(scan_part(part, source), renderer_of(model).render_many)
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("trained", pa.list_(pa.bool_()))])
    with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while len(window := fill_window(rows, seq_len)):
            sequences = window.sequences(seq_len, packing=True)
            while batch := list(islice(sequences, 512)):
                columns = [[s.input_ids for s in batch], [s.trained for s in batch]]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                num_sequences += len(batch)
                num_tokens += sum(len(s.input_ids) for s in batch)
    return num_sequences, num_tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fill_window(rows: Iterator[Any], seq_len: int) -> Window:
    """Return the samples of the next rows, each cut to one sequence."""
    window = Window()
    for _, samples in islice(rows, WINDOW_ROWS):
        for sample in samples:
            window.add(Sample(sample.input_ids[:seq_len], sample.trained[:seq_len]))
    return window


def ours(path: Path, model: str, seq_len: int, cores: int, part_bytes: int) -> Outcome:
    """Prepare all parts, one process a core."""
    source = RowSource(source=str(path))
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("fork").Pool(cores) as pool:
        began, cpu = time.perf_counter(), cpu_seconds()
        tasks = list(enumerate(cut_parts(list_files(source), part_bytes)))
        work = partial(prepare_part, source=source, model=model, seq_len=seq_len, folder=Path(folder))
        done = pool.map(work, tasks, chunksize=1)
        seconds = time.perf_counter() - began
        pool.close()
        pool.join()
        used = cpu_seconds() - cpu
    sequences, tokens, peaks = zip(*done, strict=True)
    return Outcome(seconds, used, sum(sequences), sum(tokens), max(peaks) / 1024)


def tokenise(row: dict[str, Any], tokenizer: Any, with_mask: bool) -> dict[str, Any]:
    """As TRL's SFTTrainer tokenises a conversation, with `assistant_only_loss` or without."""
    found = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=with_mask
    )
    ids = found["input_ids"]
    kept = found["assistant_masks"] if with_mask else [1] * len(ids)
    return {"input_ids": ids, "labels": [token if mask else -100 for token, mask in zip(ids, kept, strict=True)]}


def theirs(path: Path, model: str, seq_len: int, cores: int, with_mask: bool) -> Outcome:
    """`datasets.map` and `trl.pack_dataset`, nothing from a cache."""
    from trl import pack_dataset

    tokenizer = tokenizer_of(model)
    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), cpu_seconds()
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=folder)
        arguments = {"tokenizer": tokenizer, "with_mask": with_mask}
        rows = rows.map(tokenise, fn_kwargs=arguments, num_proc=cores, remove_columns=rows.column_names)
        packed = pack_dataset(rows, seq_len, "bfd", {"num_proc": cores})
        seconds, used = time.perf_counter() - began, cpu_seconds() - cpu
        lengths = pa.compute.list_value_length(packed.data.column("input_ids"))
        return Outcome(seconds, used, len(packed), pa.compute.sum(lengths).as_py())


def cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--no-memory", action="store_true", help="leave out ten times the data")
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    folder = Path(tempfile.mkdtemp())
    try:
        measure(asked, folder)
    finally:
        shutil.rmtree(folder)


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """Run what is compared in turns, so that a busy machine disturbs all alike."""
    path = folder / "rows.jsonl"
    make_rows(path, asked.rows)
    # In a run a part is 32 MiB; here every core gets several of the small file.
    part_bytes = max(1 << 20, path.stat().st_size // (4 * asked.cores))
    common = (path, asked.model, asked.seq_len, asked.cores)
    ways: dict[str, Callable[[], Outcome]] = {"dist-ft": lambda: ours(*common, part_bytes)}
    if importlib.util.find_spec("trl"):
        ways["datasets + TRL, assistant mask"] = lambda: theirs(*common, True)
        ways["datasets + TRL, no mask"] = lambda: theirs(*common, False)
    found: dict[str, list[Outcome]] = {name: [] for name in ways}
    for _ in range(asked.repeats):
        for name, way in ways.items():
            found[name].append(way())
    print(f"{asked.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB, {asked.cores} cores, {asked.model}")
    first, first_cpu = (statistics.median(values) for values in times(found["dist-ft"]))
    for name, outcomes in found.items():
        seconds, cpu = (statistics.median(values) for values in times(outcomes))
        tokens, room = outcomes[0].num_tokens, outcomes[0].num_sequences * asked.seq_len
        print(
            f"{name:32} {asked.rows / seconds:7,.0f} rows/s {seconds:6.1f} s ({cpu:6.1f} s of CPU); ours takes "
            f"1/{seconds / first:4.2f} of the time, 1/{cpu / first_cpu:4.2f} of the CPU; {tokens:,} tokens, "
            f"packed {tokens / room:.1%}"
        )
    if not asked.no_memory:
        larger = folder / "larger.jsonl"
        larger.write_bytes(path.read_bytes() * 10)
        tenfold = ours(larger, *common[1:], part_bytes)
        before = max(outcome.peak_mib for outcome in found["dist-ft"])
        print(f"peak memory of a worker: {before:.0f} MiB, with ten times the data {tenfold.peak_mib:.0f} MiB")


def times(outcomes: list[Outcome]) -> tuple[list[float], list[float]]:
    """Return seconds and seconds of CPU."""
    return [outcome.seconds for outcome in outcomes], [outcome.cpu_s for outcome in outcomes]


if __name__ == "__main__":
    main()
