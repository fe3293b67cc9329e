"""Peak memory of a rank while it builds its model, resumes and trains, by ZeRO stage and world size.

    .venv/bin/python benchmarks/memory.py [--layers 4] [--hidden 1024] [--case lora-3-2]

A random Llama is written to a scratch directory; each case runs its ranks as fresh processes on CPU with gloo.
Two peaks are shown, both above what the imports alone take and as multiples of the weights: `anon` is memory of
the process's own (sampled every millisecond), `rss` adds the pages of mapped files, which the system can drop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CASES = [(kind, stage, size) for kind in ("full", "lora") for stage in (0, 1, 2, 3) for size in (1, 2)]
_TOKENS = 256


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--case", help="one case only, such as lora-3-2 (method, ZeRO stage, ranks)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        weights = make_model(scratch / "model", arguments.layers, arguments.hidden)
        print(f"weights {weights / 2**20:.0f} MiB in float32; peaks of the largest rank as multiples of them")
        print("  method  ZeRO  ranks  load anon  load rss  resume anon  resume rss  train anon", flush=True)
        for case in CASES:
            if arguments.case not in (None, "-".join(map(str, case))):
                continue
            row = run_case(scratch, weights, *case)
            shown = [row[key] for key in ("load_anon", "load_rss", "resume_anon", "resume_rss", "train_anon")]
            widths = zip(shown, (9, 8, 11, 10, 10), strict=True)
            peaks = "  ".join(f"{value:>{width}.2f}" for value, width in widths)
            print(f"  {row['kind']:6}  {row['stage']:>4}  {row['world_size']:>5}  {peaks}", flush=True)


def make_model(directory: Path, layers: int, hidden: int) -> int:
    """Write a random Llama with the tokenizer of `tiny-random`; return the bytes of its weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dist_ft.model.embedded import materialise

    tokenizer = AutoTokenizer.from_pretrained(materialise("tiny-random"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(4 * p.numel() for p in model.parameters())


def run_case(scratch: Path, weights: int, kind: str, stage: int, size: int) -> dict[str, Any]:
    """Trains two steps and saves, then resumes in new processes; returns the peaks."""
    name = f"{kind}-{stage}-{size}"
    first = run_ranks(scratch, name, kind, stage, size, resume=False)
    second = run_ranks(scratch, name, kind, stage, size, resume=True)
    row: dict[str, Any] = {"kind": kind, "stage": stage, "world_size": size}
    for phase, peaks in (("load", first["build"]), ("resume", second["build"]), ("train", first["train"])):
        row |= {f"{phase}_{key}": round(value / weights, 3) for key, value in peaks.items()}
    return row


def run_ranks(scratch: Path, name: str, kind: str, stage: int, size: int, resume: bool) -> dict[str, dict[str, int]]:
    """Run the ranks of one attempt; return the largest peaks in bytes, by phase."""
    port_file = scratch / f"{name}-{resume}.port"
    command = [sys.executable, __file__, "--rank"]
    setting = {
        "scratch": str(scratch), "name": name, "kind": kind, "stage": stage, "world_size": size, "resume": resume,
        "port_file": str(port_file),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [*command, json.dumps({**setting, "rank": rank})],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(size)
    ]
    lines = [process.communicate()[0].strip().splitlines()[-1] for process in ranks]
    found = [json.loads(line) for line in lines]
    return {
        phase: {key: max(one[phase][key] for one in found) for key in ("anon", "rss")} for phase in ("build", "train")
    }


class Peak:
    """Samples this process's memory until it is stopped."""

    def __init__(self) -> None:
        self._base = _memory()
        self._most = self._base
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        """Return the largest growth in bytes: `anon` and `rss`."""
        self._is_over.set()
        self._thread.join()
        return {key: self._most[key] - self._base[key] for key in self._base}

    def _sample(self) -> None:
        while not self._is_over.wait(0.001):
            now = _memory()
            self._most = {key: max(value, now[key]) for key, value in self._most.items()}


def _memory() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {key: int(fields[name].split()[0]) for key, name in (("anon", "RssAnon"), ("rss", "VmRSS"))}
    return {key: value << 10 for key, value in kib.items()}


def rank_main(setting: dict[str, Any]) -> None:
    """One rank: builds, trains two steps, saves; prints its peaks."""
    import torch

    from dist_ft.checkpoint.lineage import committed, take_attempt
    from dist_ft.config import Config
    from dist_ft.coordinator.commit import Staging, commit
    from dist_ft.jobs import prepare
    from dist_ft.layout import RunDir
    from dist_ft.messages import Message, Staged
    from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
    from dist_ft.run.run_inputs import RunInputs
    from dist_ft.storage.store import LocalStore
    from dist_ft.train.build import build_rank
    from dist_ft.train.loop import run_loop
    from dist_ft.zero.engine import init_process_group, open_store

    rank, size, scratch = setting["rank"], setting["world_size"], Path(setting["scratch"])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    config = Config.model_validate(
        {
            "run": {"name": setting["name"], "output_dir": str(scratch)},
            "model": {"name": str(scratch / "model"), "dtype": "float32"},
            "method": {"kind": setting["kind"]},
            "data": {"train": [{"source": "embedded:orders/train"}], "seq_len": _TOKENS},
            "train": {"global_batch_size": 2, "max_steps": 4 if setting["resume"] else 2},
            "zero": {"stage": setting["stage"]},
            "cluster": {"num_workers": size},
            "checkpoint": {"every_steps": None},
        }
    )
    prepared = prepare.run(config)
    run_dir = RunDir(scratch / setting["name"])
    store = LocalStore(run_dir.path)
    start = committed(store)[-1] if setting["resume"] else None
    number = 2 if setting["resume"] else 1
    if rank == 0:
        take_attempt(store, start)
    attempt = AttemptSpec(
        run_id=setting["name"], attempt=number, run_dir=str(run_dir.path), config=config,
        inputs=RunInputs.from_dict({**prepared, "eval_split": None}),
        start_checkpoint=f"{start.directory}/manifest.json" if start else None,
    )  # fmt: skip
    _join(Path(setting["port_file"]), rank, size, open_store, init_process_group)
    peak = Peak()
    parts = build_rank(RankSpec(attempt, rank, size, rank, "127.0.0.1", 1))
    build = peak.stop()

    class Link:
        """Commits without a coordinator: the slice files lie where rank 0 sees them."""

        def send(self, message: Message) -> None:
            if isinstance(message, Staged):
                gathered: list[Any] = [None] * size
                torch.distributed.all_gather_object(gathered, vars(message))
                if rank == 0:
                    staging = Staging()
                    for index, fields in enumerate(gathered):
                        staging.add(index, Staged(**fields))
                    commit(store, setting["name"], number, None, staging)

        def should_stop(self) -> bool:
            return False

        def wait_committed(self, step: int) -> None:
            torch.distributed.barrier()

    peak = Peak()
    run_loop(parts, Link())
    parts.loader.close()
    print(json.dumps({"build": build, "train": peak.stop()}), flush=True)
    os._exit(0)


def _join(port_file: Path, rank: int, size: int, open_store: Any, init_process_group: Any) -> None:
    if rank == 0:
        store = open_store("127.0.0.1", 0, size)
        scratch = port_file.with_suffix(".tmp")
        scratch.write_text(str(store.port))
        scratch.rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.01)
        store = open_store("127.0.0.1", rank, size, int(port_file.read_text()))
    init_process_group(store, rank, size, False)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(json.loads(sys.argv[2]))
    else:
        main()
