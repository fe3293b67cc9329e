"""Configs of other tools that train the tiny model, and what lies beside them.

`benchmarks/peer_losses.py` has the other tools train by them, tests/numerics/test_peer_losses.py by their imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dist_ft.model.embedded import materialise

STEPS = 5
_TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3, "max_steps": STEPS,
    "lr_scheduler_type": "linear", "weight_decay": 0.01, "bf16": False, "seed": 3, "report_to": "none",
}  # fmt: skip
_LLAMAFACTORY = {
    **_TRAINER, "stage": "sft", "do_train": True, "dataset": "rows", "template": "chatml", "cutoff_len": 512,
    "disable_gradient_checkpointing": True, "disable_shuffling": True,
}  # fmt: skip
_TRL = {**_TRAINER, "max_length": 512, "gradient_checkpointing": False}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "llamafactory full": ("llamafactory", {**_LLAMAFACTORY, "finetuning_type": "full"}),
    "llamafactory lora": (
        "llamafactory",
        {**_LLAMAFACTORY, "finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 16},
    ),
    "trl full": ("trl", {**_TRL, "use_peft": False}),
    "trl lora": (
        "trl",
        {**_TRL, "use_peft": True, "lora_r": 4, "lora_alpha": 16, "lora_dropout": 0.0,
         "lora_target_modules": ["all-linear"]},
    ),
}  # fmt: skip
"""By name: the tool, and its config without what names files."""


def rows() -> list[dict[str, Any]]:
    """Return as many chats as the steps take, four each."""
    words = ["red", "blue", "green", "gold", "pink", "gray", "black"]
    chats = []
    for n in range(4 * STEPS):
        turns = [{"role": "system", "content": f"Count to {n % 5}."}] if n % 3 == 0 else []
        for turn in range(1 + n % 2):
            asked = " ".join(words[(n + turn + k) % 7] for k in range(1 + n % 6))
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{asked[::-1]} {n}"}]
        chats.append({"messages": turns})
    return chats


def write(name: str, folder: Path) -> dict[str, Any]:
    """Return the whole config of a run, and write what it names into a folder: rows, and an adapter to start from."""
    tool, keys = RUNS[name]
    model = materialise("tiny-random")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    written = {"model_name_or_path": str(model), "output_dir": str(folder / "out"), **keys}
    is_lora = name.endswith("lora")
    if is_lora:
        _write_adapter(model, folder / "adapter")
    if tool == "trl":
        return {**written, "dataset_name": str(folder / "rows.jsonl")}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
            "system_tag": "system", "observation_tag": "tool", "function_tag": "function_call"}  # fmt: skip
    data = {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": data}))
    start = {"adapter_name_or_path": str(folder / "adapter")} if is_lora else {}
    return {**written, "dataset_dir": str(folder), **start}


def _write_adapter(model: Path, folder: Path) -> None:
    """Write an adapter whose matrices A are waves, so that no random number is needed, and whose B are zero."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for number, (key, tensor) in enumerate(adapted.named_parameters()):
        if "lora_A" in key:
            tensor.data = torch.sin(torch.arange(tensor.numel()) * (0.7 + 0.01 * number)).reshape(tensor.shape) * 0.1
    adapted.save_pretrained(folder)
