"""Configs for tests: the tiny embedded model on a handful of generated rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_ft.config import Config

WORDS = ["red", "blue", "green", "gold", "pink", "gray", "black", "white", "brown", "amber", "coral", "olive"]


def write_rows(path: Path, count: int, first: int = 0) -> Path:
    """Writes chat rows of differing lengths."""
    with path.open("w") as file:
        for i in range(first, first + count):
            question = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 7))
            answer = f"{i} {WORDS[i % len(WORDS)]}"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Writes chat rows with a right and a wrong answer."""
    with path.open("w") as file:
        for i in range(first, first + count):
            turns = [{"role": "user", "content": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 7))}]
            answers = {"chosen": f"{i} {WORDS[i % len(WORDS)]}", "rejected": f"{WORDS[(i + 1) % len(WORDS)]} {i % 5}"}
            file.write(
                json.dumps({"prompt": turns, **{k: [{"role": "assistant", "content": v}] for k, v in answers.items()}})
                + "\n"
            )
    return path


def write_labelled(path: Path, count: int, first: int = 0) -> Path:
    """Writes prompts and answers as text, of which two in three are good."""
    with path.open("w") as file:
        for i in range(first, first + count):
            prompt = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 7))
            row = {"prompt": prompt, "completion": f" {i} {WORDS[i % len(WORDS)]}", "label": i % 3 != 0}
            file.write(json.dumps(row) + "\n")
    return path


def preference_config(tmp_path: Path, objective: dict[str, Any], **changes: Any) -> Config:
    """Returns the tiny config with pairs, with labelled rows for `kto`, or with chats for `distill`."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    if not train.exists():
        write = {"kto": write_labelled, "distill": write_rows}.get(objective["kind"], write_pairs)
        write(train, 41)
        write(held_out, 7, first=1000)
    config = tiny_config(tmp_path, **changes)
    return Config.model_validate({**config.model_dump(mode="json"), "objective": objective})


def tiny_config(tmp_path: Path, **changes: Any) -> Config:
    """Returns a checked config of the tiny model; `changes` are `section__key=value`."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    if not train.exists():
        write_rows(train, 41)
        write_rows(held_out, 7, first=1000)
    raw: dict[str, Any] = {
        "run": {"name": "t", "output_dir": str(tmp_path / "runs"), "seed": 3},
        "model": {"name": "tiny-random", "dtype": "float32"},
        "method": {"kind": "full", "r": 4, "lora_alpha": 8},
        "data": {"train": [{"source": str(train)}], "eval": str(held_out), "seq_len": 96, "packing": False},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 6},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1},
        "zero": {"stage": 2},
        "cluster": {"num_workers": 2},
        "checkpoint": {"every_steps": None, "in_background": False},
        "monitor": {"wandb": "disabled"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return Config.model_validate(raw)


def config_of(tmp_path: Path, *sources: str | dict[str, Any], **changes: Any) -> Config:
    """Returns the tiny config with these training sources, and nothing held out unless told."""
    train = [source if isinstance(source, dict) else {"source": source} for source in sources]
    return tiny_config(tmp_path, data__train=train, **{"data__eval": None, **changes})
