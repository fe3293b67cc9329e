"""Records what tokens Axolotl, LLaMA-Factory and TRL make of odd rows.

The recording serves tests/unit/importers/test_peer_tokens.py.

    PYTHONPATH=src:. python benchmarks/peer_tokens.py tests/unit/importers/peer_tokens.json

Each tool gets an environment of its own in /tmp/dist-ft-peers (some 4 GB, made once), and prepares the rows of
tests/helpers/peer_cases.py with its own code. Axolotl is installed without most of its dependencies, which need a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

PEERS = Path("/tmp/dist-ft-peers")
INSTALLS: dict[str, list[list[str]]] = {
    # Several calls of pip, so that a later one does not undo an earlier one.
    "trl": [["torch==2.13.0"], ["trl==1.16.0", "peft"]],
    "llamafactory": [["torch==2.13.0"], ["llamafactory==0.9.5"]],
    "axolotl": [
        ["torch==2.13.0"],
        ["--no-deps", "axolotl==0.19.0"],
        ["transformers==5.23.0", "datasets", "peft", "trl==1.9.0", "addict", "colorama", "fire", "posthog", "numba",
         "python-dotenv", "requests", "evaluate", "art", "schedulefree", "mistral-common==1.11.5", "scipy", "einops",
         "sentencepiece", "wandb", "zstandard", "triton", "tensorboard", "hf_transfer"],
    ],
}  # fmt: skip
QUIET = {
    **os.environ,
    "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled",
    "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def interpreter(tool: str) -> Path:
    """Return the Python of a tool's environment, which is made on first use."""
    folder = PEERS / tool
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True)
        for packages in INSTALLS[tool]:
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)
        done.touch()
    return folder / "bin" / "python"


def main(out: Path) -> None:
    """Let every tool prepare its cases, and write their tokens."""
    from tests.helpers.peer_cases import CASES, recorded, tokenizer

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for tool in INSTALLS:
            jobs = {}
            for number, (case, told) in enumerate(CASES.items()):
                if told.tool != tool:
                    continue
                folder = Path(name) / f"{number}"
                tokenizer(told.eos, told.bos).save_pretrained(folder)
                (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told.rows))
                jobs[case] = {"folder": str(folder), "keys": told.keys, "data": told.data}
            job, answer = Path(name) / "job.json", Path(name) / "answer.json"
            job.write_text(json.dumps(jobs))
            subprocess.run(
                [interpreter(tool), Path(__file__).resolve(), tool, job, answer], check=True, env=QUIET, cwd=name
            )
            found |= json.loads(answer.read_text())
    lines = [f"{json.dumps(case)}: {json.dumps(recorded(rows))}" for case, rows in found.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def prepare(tool: str, job: Path, answer: Path) -> None:
    """Prepare the cases of one tool, in its environment; a row becomes its tokens, and the ranges that are trained."""
    run = {"axolotl": by_axolotl, "llamafactory": by_llamafactory, "trl": by_trl}[tool]
    told = json.loads(job.read_text())
    answer.write_text(json.dumps({case: [packed(*row) for row in run(**one)] for case, one in told.items()}))


def packed(ids: list[int], labels: list[int]) -> list[str]:
    """Return tokens, and ranges of trained ones, as short texts. The first token is never predicted."""
    trained = [label != -100 for label in labels]
    trained[:1] = [False]
    edges = [n for n in range(len(trained) + 1) if (n and trained[n - 1]) != (n < len(trained) and trained[n])]
    return [" ".join(map(str, ids)), " ".join(f"{a}-{b}" for a, b in zip(edges[::2], edges[1::2], strict=True))]


def by_axolotl(folder: str, keys: dict[str, Any], data: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels as Axolotl's wrapper of a data set makes them."""
    from axolotl.utils.data.wrappers import get_dataset_wrapper
    from axolotl.utils.dict import DictDefault
    from datasets import load_dataset
    from transformers import AutoTokenizer

    cfg = DictDefault({"train_on_inputs": False, "sequence_len": 2048, "dataset_num_proc": 1, **keys})
    entry = DictDefault({"path": "rows.jsonl", **data})
    base, _, style = data["type"].partition(":") if isinstance(data["type"], str) else ("user_defined", "", "")
    rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train")
    made, _ = get_dataset_wrapper(entry, AutoTokenizer.from_pretrained(folder), cfg, base, rows, style or None)
    return [(row["input_ids"], row["labels"]) for row in made]


def by_llamafactory(folder: str, keys: dict[str, Any], data: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels as LLaMA-Factory's `get_dataset` makes them."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    (Path(folder) / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **data}}))
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))
    told = {
        "model_name_or_path": folder, "stage": "sft", "do_train": True, "finetuning_type": "lora", "dataset": "rows",
        "dataset_dir": folder, "output_dir": f"{folder}/out", "cutoff_len": 2048, "report_to": "none", **keys,
    }  # fmt: skip
    model_args, data_args, training_args, _, _ = get_train_args(told)
    loaded = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
    made = get_dataset(template, model_args, data_args, training_args, stage="sft", **loaded)["train_dataset"]
    return [(row["input_ids"], row["labels"]) for row in made]


def by_trl(folder: str, keys: dict[str, Any], data: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return tokens and labels as TRL's trainer and its collator make them."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokens = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    args = SFTConfig(output_dir=f"{folder}/out", report_to="none", max_length=2048, use_cpu=True, bf16=False, **keys)
    rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokens)
    made = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        made.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return made


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        prepare(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
