"""Advice on keys, values and whole configs that people bring from other tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from dist_ft.config.yaml_file import Yaml

QUANTISED = (
    "quantised training is not supported: exact resumes need float32 masters and optimizer state of weights that are "
    "kept as they are. Use method.kind=lora with model.dtype=bfloat16; where memory is short, zero.stage=3 and "
    "zero.offload=true"
)
TOKEN = "secrets come from the environment only: remove it here; for a hub, set HF_TOKEN"

_KEYS = (
    (re.compile(r"load_in_[48]bit|bnb_.*|quanti[sz].*|q(lora|dora)|gptq|awq|loftq.*"), QUANTISED),
    (re.compile(r"(hf_|auth_|access_|use_auth_|hub_)?token"), TOKEN),
    (re.compile(r"lr_end|min_lr|num_decay_steps"), "rates and lengths are shares: see min_lr_ratio and decay_ratio"),
)
_VALUES = {
    "method.kind": ((re.compile(r"q-?(lora|dora)|bnb.*|gptq|awq", re.IGNORECASE), QUANTISED),),
    "optimizer.kind": (
        (
            re.compile(r".*(8|4)_?bit.*|.*bnb.*|paged_.*|.*_fp8", re.IGNORECASE),
            "its moments are quantised in blocks of 256 elements, which ZeRO's partitions cut: the result would "
            "depend on the number of workers. Use optimizer.kind=lion, whose state is half of AdamW's, or "
            "zero.offload=true",
        ),
        (
            re.compile(r"adafactor|came|adam_?mini|sm3", re.IGNORECASE),
            "its second moment is made of means over whole rows and columns, which ZeRO's flat partitions do not hold. "
            "Use optimizer.kind=lion, whose state is half of AdamW's, or zero.offload=true",
        ),
        (
            re.compile(r".*(galore|apollo|q_?galore).*", re.IGNORECASE),
            "it projects the gradients of whole matrices, which ZeRO's flat partitions do not hold. Use "
            "method.kind=lora, or optimizer.kind=lion, whose state is half of AdamW's",
        ),
        (
            re.compile(r".*muon.*", re.IGNORECASE),
            "DeepSpeed keeps its momentum for whole matrices, on each rank that holds a part of one, and clips its "
            "update at ZeRO 1 to 3 but the gradient at ZeRO 0: the result would depend on the stage. Use "
            "optimizer.kind=adamw",
        ),
        (
            re.compile(r"adamw?(_(torch|hf|apex|anyprecision)(_\w+)?)?", re.IGNORECASE),
            "write optimizer.kind=adamw, which runs fused and with float32 moments",
        ),
        (re.compile(r"lion_.*", re.IGNORECASE), "write optimizer.kind=lion"),
        (
            re.compile(r"schedule_?free.*", re.IGNORECASE),
            "of the schedule-free optimizers there is optimizer.kind=schedule_free_adamw",
        ),
    ),
    "schedule.kind": (
        (
            re.compile(r"cosine_with_(hard_)?restarts", re.IGNORECASE),
            "write schedule.kind=cosine and schedule.num_cycles",
        ),
        (
            re.compile(r"(cosine_with_min_lr|cosine_warmup_with_min_lr)", re.IGNORECASE),
            "write schedule.kind=cosine and schedule.min_lr_ratio",
        ),
        (re.compile(r"warmup_stable_decay", re.IGNORECASE), "write schedule.kind=wsd"),
    ),
}
# As the hub writes them, and user info in a URL.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|//[^/@\s]+@")


def advice_on_key(key: str) -> str | None:
    """Returns what to do instead of an unknown key, if other tools have it."""
    return next((advice for pattern, advice in _KEYS if pattern.fullmatch(key.lower())), None)


def advice_on_value(key: str, value: Yaml) -> str | None:
    """Returns what to do instead of a refused value, if other tools take it."""
    if not isinstance(value, str):
        return None
    return next((advice for pattern, advice in _VALUES.get(key, ()) if pattern.fullmatch(value)), None)


def keys_with_secrets(raw: Yaml, key: str = "") -> Iterator[str]:
    """Yields the keys whose values contain a token or the user info of a URL. Do not show these values."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from keys_with_secrets(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from keys_with_secrets(value, f"{key}.{index}")
    elif isinstance(raw, str) and _SECRET.search(raw):
        yield key


ToolName = Literal["axolotl", "llamafactory", "trl", "dist-ft"]

_AXOLOTL = {"base_model", "sequence_len", "micro_batch_size", "num_epochs", "sample_packing", "adapter", "datasets"}
_LLAMAFACTORY = {"finetuning_type", "stage", "template", "cutoff_len", "dataset_dir", "lora_rank", "do_train"}
_LLAMAFACTORY_ONLY = {"finetuning_type", "cutoff_len", "adapter_name_or_path", "infer_backend", "model_class"}
_TRL = {"dataset_name", "use_peft", "max_length", "dataset_train_split", "assistant_only_loss", "dataset_config"}


def tool_of(raw: dict[str, Yaml]) -> ToolName | None:
    """Returns the tool that a config was written for; None when its keys do not show it."""
    if any(isinstance(raw.get(key), dict) for key in ("model", "data", "method", "train")):
        return "dist-ft"
    if raw.keys() & _LLAMAFACTORY_ONLY:
        return "llamafactory"
    counts: dict[ToolName, int] = {
        "axolotl": len(raw.keys() & _AXOLOTL) + 2 * ("base_model" in raw),
        "llamafactory": len(raw.keys() & _LLAMAFACTORY),
        "trl": len(raw.keys() & _TRL),
    }
    best = max(counts, key=lambda tool: counts[tool])
    if counts[best] < 2 and "model_name_or_path" in raw:
        return "trl"
    return best if counts[best] >= 2 else None


def import_hint(path: str, raw: dict[str, Yaml]) -> str | None:
    """Returns what to do with a config of another tool; None when it is none."""
    tool = tool_of(raw)
    if tool in (None, "dist-ft"):
        return None
    return (
        f"{path} is a config of {tool}, not of dist-ft; write a dist-ft config from it: "
        f"dist-ft import {tool} {path} --to my.yaml"
    )
