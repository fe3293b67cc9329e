"""Records what TRL's preference trainers compute, for tests/numerics/test_trl.py.

    pip install --no-deps --target /tmp/trl trl==1.16.0    # it needs nothing that is not installed
    PYTHONPATH=/tmp/trl:src python benchmarks/trl_preferences.py tests/numerics/trl_preferences.json

The tiny embedded model in float32, all weights, AdamW at 1e-3 without decay, clipping or schedule; 4 steps of 8 rows in
their order. Each run records the loss of every step and 16 elements of every weight at the end.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dist_ft.model.embedded import materialise

WORDS = ["red", "blue", "green", "gold", "pink", "gray", "black", "white", "brown", "amber", "coral", "olive"]
STEPS, BATCH, ELEMENTS = 4, 8, 16
RUNS: dict[str, tuple[Any, Any, dict[str, Any], int]] = {
    # Trainer, its config, settings, pairs of a pass: what TRL averages over the tokens of a pass needs one pair.
    **{
        f"dpo {loss}": (DPOTrainer, DPOConfig, {"loss_type": [loss], **others}, 4)
        for loss, others in {
            "sigmoid": {}, "hinge": {}, "ipo": {}, "sigmoid_norm": {}, "apo_zero": {}, "apo_down": {},
            "robust": {"label_smoothing": 0.1},
        }.items()
    },
    "dpo sft": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, 1),
    "cpo sigmoid": (CPOTrainer, CPOConfig, {"loss_type": "sigmoid", "cpo_alpha": 1.0}, 1),
    "cpo simpo": (CPOTrainer, CPOConfig, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}, 1),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": 0.1}, 1),
    "kto kto": (KTOTrainer, KTOConfig, {"loss_type": "kto", "undesirable_weight": 1.5}, BATCH),
    "kto apo_zero_unpaired": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}, BATCH),
}  # fmt: skip


def pairs() -> list[dict[str, Any]]:
    """Return texts with two answers each."""
    return [
        {
            "prompt": " ".join(WORDS[(i + k) % len(WORDS)] for k in range(2 + i % 7)),
            "chosen": f" {i} {WORDS[i % len(WORDS)]}",
            "rejected": f" {WORDS[(i + 1) % len(WORDS)]} {i % 5} {WORDS[i % 3]}",
        }
        for i in range(STEPS * BATCH)
    ]


def labelled() -> list[dict[str, Any]]:
    """Return texts with a labelled answer: as many as a step has, so that TRL's neighbours are those of the shard."""
    rows = pairs()[:BATCH]
    sides = ["chosen" if i % 3 else "rejected" for i in range(BATCH)]
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(rows, sides, strict=True)
    ]


def run(name: str, directory: Path) -> dict[str, Any]:
    """Trains, and returns the losses and some of the weights."""
    trainer_type, config_type, settings, micro = RUNS[name]
    rows = labelled() if name.startswith("kto") else pairs()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    losses: list[float] = []

    class Ordered(trainer_type):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    with tempfile.TemporaryDirectory() as scratch:
        args = config_type(
            output_dir=scratch, per_device_train_batch_size=micro, gradient_accumulation_steps=BATCH // micro,
            max_steps=STEPS, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0,
            bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no", max_length=None,
            disable_tqdm=True, logging_steps=100, optim="adamw_torch", **settings,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(directory)
        trainer = Ordered(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    per_step = BATCH // micro
    steps = [sum(losses[i : i + per_step]) / per_step for i in range(0, len(losses), per_step)]
    weights = {}
    for key, parameter in trainer.model.named_parameters():
        flat = parameter.detach().float().flatten()
        index = torch.linspace(0, len(flat) - 1, ELEMENTS).long()
        weights[key] = [float(value) for value in flat[index]]
    return {"losses": steps, "weights": weights}


if __name__ == "__main__":
    path = materialise("tiny-random")
    found = {name: run(name, path) for name in RUNS}
    Path(sys.argv[1]).write_text(json.dumps({"pairs": pairs(), "labelled": labelled(), "runs": found}) + "\n")
