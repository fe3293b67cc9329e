"""Records the losses of LLaMA-Factory and TRL on the tiny model, for tests/numerics/test_peer_losses.py.

    PYTHONPATH=src:. python benchmarks/peer_losses.py tests/numerics/peer_losses.json

Each tool trains in its own environment (see peer_tokens.py): float32 on the CPU, one config with LoRA and one with all
weights, 5 steps of 2 x 2 rows in their order. An adapter starts from the same matrices as ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer


def main(out: Path) -> None:
    """Let the tools train, and write their losses."""
    from peer_tokens import QUIET, interpreter

    from tests.helpers.peer_runs import RUNS, write

    found: dict[str, Any] = {}
    for name, (tool, _) in RUNS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            job, answer = folder / "job.json", folder / "answer.json"
            job.write_text(json.dumps(write(name, folder)))
            subprocess.run(
                [interpreter(tool), Path(__file__).resolve(), tool, job, answer], check=True, env=QUIET, cwd=folder
            )
            found[name] = json.loads(answer.read_text())
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def train(tool: str, keys: dict[str, Any], folder: Path) -> list[float]:
    """Train in the environment of a tool; return the loss of each step."""
    losses: list[float] = []
    plain_step = Trainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain_step(self, *args, **kwargs)
        losses.append(float(found))
        return found

    Trainer.training_step = step
    Trainer._get_train_sampler = lambda self, *args: torch.utils.data.SequentialSampler(self.train_dataset)
    if tool == "llamafactory":
        from llamafactory.train.tuner import run_exp

        run_exp(keys)
    else:
        _by_trl(keys, folder)
    return [sum(losses[n : n + 2]) for n in range(0, len(losses), 2)]


def _by_trl(keys: dict[str, Any], folder: Path) -> None:
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

    (folder / "theirs.yaml").write_text(json.dumps(keys))
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, args, model_args = parser.parse_args_and_config(
        ["--config", str(folder / "theirs.yaml"), "--use_cpu", "true"]
    )
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=torch.float32)
    if model_args.use_peft:  # a config cannot name an adapter to start from
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    rows = load_dataset("json", data_files=script.dataset_name, split="train")
    tokens = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokens).train()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        told = json.loads(Path(sys.argv[2]).read_text())
        Path(sys.argv[3]).write_text(json.dumps(train(sys.argv[1], told, Path(sys.argv[2]).parent)))
