"""Reads the settings that `method` takes from the adapter in `method.init_from`.

Torch-free, so that a contradiction is reported at once. `model/adapter.py`, which imports PEFT, checks keys that PEFT
may add later.
"""

from __future__ import annotations

import json
from pathlib import Path

from dist_ft.config.paths import is_there
from dist_ft.config.schema import Config
from dist_ft.errors import ConfigError

PeftValue = str | bool | int | float | list[str] | list[int] | None

_DEFAULTS: dict[str, PeftValue] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "modules_to_save": [], "use_rslora": False,
    "use_dora": False, "layers_to_transform": None,
}  # fmt: skip
"""The keys that `method` takes over, with PEFT's defaults for those that adapter_config.json leaves out."""

FREE = frozenset({"lora_dropout"})
"""Keys that may differ from the adapter's, because they do not change what it computes."""


def with_adapter_settings(config: Config) -> Config:
    """Return the config with the adapter's settings for the keys of `method` that the user has not set.

    Call it only on a config from `load_config`; in one that was sent between processes, all keys are set.

    Raises:
        ConfigError: A key contradicts the adapter, or training cannot continue from the adapter.
    """
    method = config.method
    if method.init_from is None:
        return config
    stored = adapter_settings(method.init_from)
    mine, theirs = config.model.name, str(stored.pop("base_model_name_or_path") or "")
    # Two different hub names are two models. Different paths can hold the same model.
    names = [
        name for name in (mine, theirs) if name and not name.startswith((".", "/", "~")) and not is_there(Path(name))
    ]
    if len(names) == 2 and names[0].lower() != names[1].lower():
        raise ConfigError(
            f"model.name={mine}, but the adapter in method.init_from={method.init_from} was trained on "
            f"{theirs}; set model.name={theirs}, or correct base_model_name_or_path in its adapter_config.json if "
            "both have the same weights"
        )
    problems = [
        f"method.{key}={getattr(method, key)}, but the adapter in method.init_from={method.init_from} has "
        f"{key}={stored[key]}; set method.{key}={json.dumps(stored[key])}, or leave it out"
        for key in sorted(method.model_fields_set & stored.keys() - FREE)
        if not same(getattr(method, key), stored[key])
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    taken = {key: value for key, value in stored.items() if key not in method.model_fields_set}
    return config.model_copy(update={"method": method.model_copy(update=taken)})


def adapter_settings(directory: str) -> dict[str, PeftValue]:
    """Return the settings of a LoRA adapter under the keys of `method`, and the name of its base model.

    Raises:
        ConfigError: The directory is not a LoRA adapter in safetensors.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kind = stored["peft_type"]
        found = {key: stored.get(key, default) for key, default in _DEFAULTS.items()}
        layers, targets = found["layers_to_transform"], found["target_modules"]
        found |= {
            # PEFT stores a set, in no fixed order. Without a value, it uses the default of the model family.
            "target_modules": sorted(targets) if isinstance(targets, list) else targets or "all-linear",
            "modules_to_save": sorted(found["modules_to_save"] or []),
            "layers_to_transform": [layers] if isinstance(layers, int) else layers,
            "lora_alpha": float(found["lora_alpha"]),
            "lora_dropout": float(found["lora_dropout"]),
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"method.init_from={directory}: {path} is no adapter's config: {error}") from error
    if kind != "LORA":
        raise ConfigError(
            f"method.init_from={directory} is an adapter of peft_type={kind}; only LORA can be gone on from: "
            "leave method.init_from out, or merge it into the base model with PEFT and train on that"
        )
    if not (path.parent / "adapter_model.safetensors").is_file():
        raise ConfigError(
            f"method.init_from={directory}: adapter_model.safetensors is missing; other formats can run code when "
            "they are loaded. Write it with PEFT's save_pretrained"
        )
    return {**found, "base_model_name_or_path": stored.get("base_model_name_or_path")}


def same(mine: PeftValue, theirs: PeftValue) -> bool:
    """Return whether two settings are equal. PEFT treats lists as sets."""
    if isinstance(mine, list) and isinstance(theirs, list):
        return sorted(map(str, mine)) == sorted(map(str, theirs))
    return mine == theirs
