#!/usr/bin/env python3
"""Training speed of dist-ft against a bare PyTorch loop, and TRL's where it is installed, on this machine.

    python benchmarks/training.py [--rounds 3] [--cases lora,full-1] [--json FILE]

Both sides do the same work: the same rows in the same micro batches, bfloat16 weights, float32 masters and
gradient accumulation, clipping, AdamW, output layer on trained tokens only, the same number of threads, one
worker. The bare side is plain torch, transformers and peft. Sides alternate, each round in a process of its
own; what is compared are medians over all steps but the first of each process. A CUDA device is used if there is one.

Packed cases also run TRL's SFTTrainer, if it can be imported (`pip install --no-deps --target DIR trl==1.16.0`, DIR on
PYTHONPATH): the same samples, packed by TRL, weights in bfloat16 without float32 masters, as is its default.

Cases: `lora` (16 rows, about 1,050 tokens a step), `full-N` (64 rows, about 4,200 tokens a step, ZeRO stage N),
`packed-N` (LoRA, one packed row of 2,048 tokens a step, of samples of N tokens of Python's own documentation; the bare
side gives the model positions, so that transformers makes its mask of [T, T]), `llama-lora`, `llama-full` (a random
Llama of 1.2B parameters, 8 packed rows of 2,048 tokens a step; for a GPU), `reporting` (what a metrics row costs
the rank, and the coordinator with W&B offline).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

STEPS = {"lora": 6, "full": 3, "packed": 3, "llama": 8}
MICRO_BATCH = {"lora": 8, "full": 8, "packed": 1, "llama": 4}
GLOBAL_BATCH = {"lora": 16, "full": 64, "packed": 1, "llama": 8}
PACKED_LEN = 2048
LLAMA_SAMPLE = 512


def make_config(case: str, directory: str) -> Any:
    """Return the run config of a case."""
    from dist_ft.config import config_from_dict

    name, _, variant = case.partition("-")
    is_packed = name in ("packed", "llama")
    model = str(write_llama(Path(directory))) if name == "llama" else "smollm2-135m-instruct"
    length = int(variant) if name == "packed" else LLAMA_SAMPLE
    source = str(write_samples(Path(directory), length, model)) if is_packed else "embedded:orders/train"
    return config_from_dict(
        {
            "run": {"name": case, "output_dir": directory},
            "model": {"name": model, "dtype": "bfloat16"},
            "method": {"kind": "full" if case.startswith("full-") or variant == "full" else "lora"},
            "data": {
                "train": [{"source": source}],
                "seq_len": PACKED_LEN if is_packed else 128,
                "packing": is_packed,
            },
            "train": {
                "global_batch_size": GLOBAL_BATCH[name],
                "micro_batch_size": MICRO_BATCH[name],
                "max_steps": STEPS[name],
            },
            "optimizer": {"lr": 1e-4},
            "schedule": {"kind": "constant", "warmup_ratio": 0.0},  # as the bare loop: the losses must agree
            "zero": {"stage": int(variant) if name == "full" else 1 if name == "llama" else 2},
            "monitor": {"wandb": "disabled"},
        }
    )


def write_llama(directory: Path) -> Path:
    """Write a random Llama of 1.2B parameters, in the shape of Llama 3.2 1B, with the tokenizer of `tiny-random`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from dist_ft.model.embedded import materialise

    path = directory / "llama-1b"
    if not (path / "tokenizer_config.json").exists():
        shape = LlamaConfig(
            vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=PACKED_LEN, tie_word_embeddings=True, dtype="bfloat16",
        )  # fmt: skip
        with torch.device(device()):
            LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(path)
        AutoTokenizer.from_pretrained(materialise("tiny-random")).save_pretrained(path)
    return path


def device() -> str:
    """Return where the sides compute."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def local_path(model: str) -> str:
    """Return the directory of an embedded model, or what is a directory already."""
    from dist_ft.model.embedded import is_embedded, materialise

    return str(materialise(model)) if is_embedded(model) else model


def write_samples(directory: Path, length: int, model: str) -> Path:
    """Write rows of text of about `length` tokens each."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    path = directory / f"samples-{length}.jsonl"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(local_path(model))
        ids = tokenizer("".join(topics.values()), verbose=False).input_ids[: 64 * PACKED_LEN]
        # One less, because each sample ends with its end token.
        texts = [tokenizer.decode(ids[at : at + length - 1]) for at in range(0, len(ids) - length, length - 1)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run_dist_ft(case: str, directory: str) -> dict[str, Any]:
    """One process of the dist-ft side: the rank's own build and loop, without supervisor."""
    import torch

    from dist_ft.jobs.prepare import prepare
    from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
    from dist_ft.train.build import build_rank
    from dist_ft.train.loop import run_loop
    from dist_ft.zero.devices import use_device
    from dist_ft.zero.engine import init_process_group, open_store

    on_gpu = device() == "cuda"
    if on_gpu:
        use_device(0)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = make_config(case, directory)
    inputs = replace(prepare(config).inputs, eval_split=None)
    attempt = AttemptSpec(
        run_id=case, attempt=1, run_dir=tempfile.mkdtemp(dir=directory), config=config, inputs=inputs, on_gpu=on_gpu
    )
    threads = torch.get_num_threads()
    init_process_group(open_store("127.0.0.1", 0, 1), 0, 1, on_gpu)
    rows: list[Any] = []

    class Collect:
        def send(self, message: Any) -> None:
            if message.kind == "step_done":
                rows.append(message.row)

        def should_stop(self) -> bool:
            return False

        def wait_committed(self, step: int) -> None:
            pass

    parts = build_rank(RankSpec(attempt, 0, 1, 0, "127.0.0.1", threads))
    run_loop(parts, Collect())
    parts.loader.close()
    return {"step_s": [r.step_s for r in rows], "tokens": [r.tokens for r in rows], "loss": rows[-1].loss}


def run_bare(case: str, directory: str) -> dict[str, Any]:
    """One process of the bare side. Batches are made first; the loop is plain torch."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from dist_ft.config.data_sections import LoaderConfig
    from dist_ft.data.stream.cache import open_split
    from dist_ft.data.stream.loader import RankLayout, TrainLoader, build_order
    from dist_ft.jobs.prepare import prepare

    config = make_config(case, directory)
    inputs = prepare(config).inputs
    shards = [open_split(split, LoaderConfig()) for split in inputs.splits]
    loader = TrainLoader(
        build_order(shards, config.data, config.run.seed),
        shards,
        RankLayout(0, 1, MICRO_BATCH[case.partition("-")[0]]),
        config.train.global_batch_size,
        inputs.num_positions,
    )
    batches = [loader.step(step) for step in range(inputs.max_steps)]

    model = AutoModelForCausalLM.from_pretrained(local_path(config.model.name), dtype=torch.bfloat16)
    model.to(device())
    torch.manual_seed(0)
    if config.method.kind == "lora":
        adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    model.train()
    inner = model.get_base_model() if config.method.kind == "lora" else model
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0.0, fused=True)
    seconds = []
    loss = 0.0
    for batch in batches:
        began = time.perf_counter()
        total = 0.0
        for micro in batch.micro_batches:
            ids, targets = torch.from_numpy(micro.input_ids).to(device()), torch.from_numpy(micro.targets).to(device())
            keep = targets != -100
            positions = torch.from_numpy(micro.position_ids).to(device()) if config.data.packing else None
            hidden = inner.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[keep]
            loss_sum = F.cross_entropy(inner.lm_head(hidden).float(), targets[keep], reduction="sum")
            (loss_sum / batch.totals.num_trained_tokens).backward()
            total += loss_sum.item()
            for master, parameter in zip(masters, trained, strict=True):
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
        if device() == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        loss = total / batch.totals.num_trained_tokens
    return {"step_s": seconds, "tokens": [b.totals.num_tokens for b in batches], "loss": loss}


def run_trl(case: str, directory: str) -> dict[str, Any]:
    """One process of TRL's side: SFTTrainer on the same samples, packed by TRL."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    config = make_config(case, directory)
    name, path = case.partition("-")[0], local_path(config.model.name)
    rows = Path(config.data.train[0].source).read_text(encoding="utf-8").splitlines()
    seconds: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **others: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            if device() == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=directory, packing=True, max_length=PACKED_LEN, max_steps=STEPS[name], learning_rate=1e-4,
            per_device_train_batch_size=MICRO_BATCH[name], save_strategy="no", report_to="none", logging_steps=1,
            gradient_accumulation_steps=GLOBAL_BATCH[name] // MICRO_BATCH[name], lr_scheduler_type="constant",
            gradient_checkpointing=False, bf16=False, use_cpu=device() == "cpu", dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([json.loads(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
        if config.method.kind == "lora"
        else None,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    packed = [len(row["input_ids"]) for row in trainer.train_dataset]
    tokens = round(statistics.mean(packed) * GLOBAL_BATCH[name])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_s": seconds, "tokens": [tokens] * len(seconds), "loss": losses[-1]}


SIDES = {"bare": run_bare, "dist-ft": run_dist_ft, "trl": run_trl}


def run_reporting(directory: str) -> dict[str, Any]:
    """Measure what one metrics row costs: the rank's `send`, and the coordinator with a W&B run (offline)."""
    import queue

    from dist_ft.coordinator.core import Coordinator
    from dist_ft.messages import Envelope, StepDone
    from dist_ft.metric_rows import StepRow
    from dist_ft.monitor.wandb_sink import WandbSink
    from dist_ft.run.place import open_run
    from dist_ft.run.run_inputs import RunInputs
    from dist_ft.run.state import RunRecord
    from dist_ft.slices import Fingerprint

    run = open_run(tempfile.mkdtemp(dir=directory))
    config = make_config("lora", directory)
    sink = WandbSink("bench", "bench", "bench", "offline", run.path, {})
    prepared = RunInputs((), None, Fingerprint("m", "d", 0, "kind=full", 8), 10_000, 10_000)
    coordinator = Coordinator(config, run, RunRecord("lora", max_steps=10_000), prepared, [sink])
    spec = coordinator.open_attempt(1, time.monotonic())
    assert spec is not None
    attempt = spec.attempt
    outbox: queue.Queue[Any] = queue.Queue()
    send_s, handle_s = [], []
    for step in range(1, 501):
        row = StepRow(
            step, attempt, world_size=1, epoch=0, position=step, loss=1.0, lr=1.0, grad_norm=1.0, trained_tokens=1,
            tokens=1, tokens_per_s=1.0, step_s=1.0, data_s=0.0, digest="0" * 16, goodput=None, metrics={},
        )  # fmt: skip
        began = time.perf_counter()
        outbox.put(StepDone(row, []))  # what SocketLink.send does
        send_s.append(time.perf_counter() - began)
        envelope = Envelope("lora", attempt, 0, outbox.get()).to_dict()
        began = time.perf_counter()
        coordinator.handle(Envelope.from_dict(envelope), time.monotonic())
        handle_s.append(time.perf_counter() - began)
    coordinator.finish("failed", {})
    return {"send_s": statistics.median(send_s), "handle_s": statistics.median(handle_s)}


def in_process(side: str, case: str, directory: str) -> dict[str, Any]:
    """Run one side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--cases", case, "--directory", directory]
    env = {**os.environ, "DS_ACCELERATOR": device(), "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(case: str, rounds: int, directory: str) -> dict[str, Any]:
    """Alternates the sides and returns medians and the ratios of speeds."""
    has_trl = case.startswith(("packed-", "llama-")) and importlib.util.find_spec("trl") is not None
    sides = ["bare", "dist-ft", *(["trl"] if has_trl else [])]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    per_step: dict[str, float] = {}
    losses = {}
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            found = in_process(side, case, directory)
            seconds[side] += found["step_s"][1:]
            losses[side] = found["loss"]
            per_step[side] = statistics.mean(found["tokens"][1:])
    speed = {side: per_step[side] / statistics.median(values) for side, values in seconds.items()}
    return {
        "case": case,
        "tokens_per_step": round(per_step["dist-ft"]),
        "tokens_per_s": {side: round(value, 1) for side, value in speed.items()},
        "ratio": {side: round(speed["dist-ft"] / value, 3) for side, value in speed.items() if side != "dist-ft"},
        "last_loss": {side: round(loss, 4) for side, loss in losses.items()},
    }


def main() -> None:
    """Run the cases and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="reporting,lora,full-1,full-2,full-3")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(SIDES[options.side](options.cases, options.directory)))
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="dist-ft-bench-") as directory:
        for case in options.cases.split(","):
            if case == "reporting":
                result = {"case": case, **run_reporting(directory)}
            else:
                result = compare(case, options.rounds, directory)
            print(json.dumps(result), flush=True)
            results.append(result)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
