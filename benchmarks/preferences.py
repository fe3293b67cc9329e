#!/usr/bin/env python3
"""Speed of scoring and of DPO on the embedded 135M model, against a bare forward loop and TRL's DPOTrainer.

    pip install --no-deps --target /tmp/trl trl==1.16.0    # it needs nothing that is not installed
    PYTHONPATH=/tmp/trl:src python benchmarks/preferences.py [--rounds 3] [--json FILE]

All sides have the same rows (pairs of the embedded orders), float32, the same threads; LoRA of rank 16 on all linear
layers, 8 pairs a step, 4 a pass, one epoch. Sides alternate, each in a process of its own; the medians are compared.
Times begin when the trained model is loaded. Ours has preparation and scoring in it, with the load of the frozen model.
Besides the seconds on the clock those of the processor are told, of all threads: a busy machine spoils them less.

- `forward`: the frozen model over padded passes of answers in the order of their length, and the log-probability of
  each token; `scoring`: the task's own function over the same rows. `scoring-64` and `forward-64` take the 64 likeliest
  tokens of each place besides, as a teacher does.
- `trl`: the reference is the model without its adapter, in each step; `trl-precomputed`: before the first one.
"""

from __future__ import annotations

import argparse
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

import numpy as np
from numpy.typing import NDArray

PAIRS, BATCH, MICRO = 64, 8, 4
SIDES = ("forward", "scoring", "forward-64", "scoring-64", "dist-ft", "trl", "trl-precomputed")
RATIOS = (("scoring", "forward"), ("scoring-64", "forward-64"), ("dist-ft", "trl"), ("dist-ft", "trl-precomputed"))


Spent = NDArray[np.float64]
"""Seconds on the clock, and of the processor."""


def now() -> Spent:
    """Return both clocks."""
    return np.array([time.perf_counter(), time.process_time()])


def make_config(directory: str, objective: dict[str, Any]) -> Any:
    """Return the run config."""
    from dist_ft.config import config_from_dict

    return config_from_dict(
        {
            "run": {"name": "dpo", "output_dir": directory},
            "model": {"name": "smollm2-135m-instruct", "dtype": "float32"},
            "method": {"kind": "lora", "r": 16, "lora_alpha": 32},
            "objective": objective,
            "data": {
                "train": [{"source": "embedded:orders-pairs/train", "rows": [0, PAIRS]}],
                "seq_len": 128, "packing": False, "cache_dir": tempfile.mkdtemp(dir=directory),
            },
            "train": {"global_batch_size": BATCH, "micro_batch_size": MICRO, "epochs": 1},
            "optimizer": {"lr": 1e-5},
            "monitor": {"wandb": "disabled"},
        }
    )  # fmt: skip


def run_dist_ft(directory: str) -> Spent:
    """Prepare, score and train one epoch; return what it took."""
    import torch

    from dist_ft.jobs.prepare import prepare
    from dist_ft.jobs.score import score_split
    from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
    from dist_ft.train.build import build_rank
    from dist_ft.train.loop import run_loop
    from dist_ft.zero.engine import init_process_group, open_store

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = make_config(directory, {"kind": "dpo"})

    class Link:
        def send(self, message: Any) -> None: ...

        def should_stop(self) -> bool:
            return False

        def wait_committed(self, step: int) -> None: ...

    began = now()
    score_split(config, prepare(config).inputs.splits[0])
    inputs = prepare(config).inputs
    before = now() - began
    attempt = AttemptSpec("dpo", attempt=1, run_dir=tempfile.mkdtemp(dir=directory), config=config, inputs=inputs)
    init_process_group(open_store("127.0.0.1", 0, 1), 0, 1, False)
    parts = build_rank(RankSpec(attempt, 0, 1, 0, "127.0.0.1", torch.get_num_threads()))
    began = now()
    run_loop(parts, Link())
    parts.loader.close()
    return before + now() - began


def run_trl(directory: str, is_precomputed: bool) -> Spent:
    """Train one epoch with TRL; return what it took."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dist_ft.data.sources.generated import embedded_rows
    from dist_ft.model.embedded import materialise

    path = materialise("smollm2-135m-instruct")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    rows = embedded_rows("orders-pairs/train")[:PAIRS]
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=directory), per_device_train_batch_size=MICRO, num_train_epochs=1,
        gradient_accumulation_steps=BATCH // MICRO, learning_rate=1e-5, bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1000,
        precompute_ref_log_probs=is_precomputed,
    )  # fmt: skip
    began = now()
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    return now() - began


def run_forward(directory: str, top_k: int, is_bare: bool) -> Spent:
    """Score all pairs with a model that is loaded; return what it took."""
    import torch

    from dist_ft.data.stream.cache import open_split
    from dist_ft.jobs.prepare import prepare
    from dist_ft.jobs.score import PASS_TOKENS, score_sequences
    from dist_ft.model.base import load_model
    from dist_ft.objectives.kinds import build_objective
    from dist_ft.objectives.module import ObjectiveModule

    teacher = {"kind": "distill", "teacher": "smollm2-135m-instruct", "top_k": top_k}
    config = make_config(directory, teacher if top_k else {"kind": "dpo"})
    if top_k:  # a teacher learns from chats: the rows of pairs, one answer each
        source = config.data.train[0].model_copy(update={"source": "embedded:orders/train"})
        config = config.model_copy(update={"data": config.data.model_copy(update={"train": [source]})})
    split = replace(prepare(config).inputs.splits[0], score_key="")
    shards = open_split(split, config.data.loader)
    rows = [shards.read(0, index) for index in range(split.known_counts.num_sequences)]
    model = load_model(config).eval()
    began = now()
    if not is_bare:
        objective = build_objective(config.objective)
        assert objective.scorer is not None
        module = ObjectiveModule(model).eval()
        score_sequences(module, objective.scorer, rows, objective.rows_per_slot, torch.device("cpu"))
        return now() - began
    parts = [
        (row.input_ids[at:end], row.trained[at:end])
        for row in rows
        for at, end in zip(row.starts, [*row.starts[1:], len(row.input_ids)], strict=True)
    ]
    parts.sort(key=lambda part: -len(part[0]))
    while parts:
        count = max(1, PASS_TOKENS["cpu"] // len(parts[0][0]))
        batch, parts = parts[:count], parts[count:]
        ids = torch.zeros(len(batch), len(batch[0][0]), dtype=torch.long)
        for place, (tokens, _) in enumerate(batch):
            ids[place, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        with torch.no_grad():
            logps = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            logps.gather(-1, ids[:, 1:, None])
            if top_k:
                logps.topk(top_k)
    return now() - began


def run(side: str, directory: str) -> Spent:
    """Run one side in this process; return what it took."""
    name, _, top_k = side.partition("-")
    if name == "trl":
        return run_trl(directory, is_precomputed=side == "trl-precomputed")
    if name in ("forward", "scoring"):
        return run_forward(directory, int(top_k or 0), is_bare=name == "forward")
    return run_dist_ft(directory)


def main() -> None:
    """Alternate the sides; print medians and ratios of speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dist-ft-bench-") as directory:
        if options.side is not None:
            print(json.dumps(run(options.side, directory).tolist()))
            return
        found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        for number in range(options.rounds):
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                command = [sys.executable, __file__, "--side", side]
                env = {**os.environ, "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
                if done.returncode != 0:
                    sys.exit(done.stderr)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{side} {found[side][-1][0]:.1f} s, {found[side][-1][1]:.1f} of the processor", flush=True)
    result = {}
    for index, clock in enumerate(("seconds", "processor_seconds")):
        medians = {side: statistics.median(spent[index] for spent in values) for side, values in found.items()}
        ratios = {f"{one} / {other}": round(medians[other] / medians[one], 2) for one, other in RATIOS}
        result[clock] = {"medians": {side: round(value, 2) for side, value in medians.items()}, "speed": ratios}
    print(json.dumps(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
