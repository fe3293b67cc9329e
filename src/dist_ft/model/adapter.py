"""LoRA through PEFT: attach, name for export, load back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from dist_ft.config import Config
from dist_ft.config.schema import MethodConfig
from dist_ft.errors import ConfigError

ADAPTER = "default"


def lora_config(config: Config) -> LoraConfig:
    """Returns PEFT's config for `method`."""
    method = config.method
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        target_modules=method.target_modules,
        modules_to_save=list(method.modules_to_save) or None,
        base_model_name_or_path=config.model.name,
    )


def attach_adapter(model: nn.Module, config: Config) -> Any:
    """Wraps the base model with LoRA matrices in the base's dtype; only they require gradients.

    The matrices depend on `run.seed` alone.

    Raises:
        ConfigError: `method.target_modules` names no module, or `method.init_from` does not fit.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(config.run.seed)
    try:
        if config.method.init_from is not None:
            return _load_start(model, config.method)
        _check_targets(model, config)
        return get_peft_model(model, lora_config(config), autocast_adapter_dtype=False)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
        method = config.method
        used = {"init_from": method.init_from, "modules_to_save": method.modules_to_save}
        key, value = next(((k, v) for k, v in used.items() if v), ("target_modules", method.target_modules))
        raise ConfigError(f"method.{key}={value} does not fit {config.model.name}: {error}") from error
    finally:
        torch.random.set_rng_state(state)


def _load_start(model: nn.Module, method: MethodConfig) -> Any:
    assert method.init_from is not None
    stored = PeftConfig.from_pretrained(method.init_from)
    for key in ("r", "lora_alpha"):
        mine, theirs = getattr(method, key), getattr(stored, key, None)
        if mine != theirs:
            raise ConfigError(
                f"method.{key}={mine}, but the adapter in method.init_from={method.init_from} has {key}={theirs}; "
                f"set method.{key}={theirs}"
            )
    beside = sorted(stored.modules_to_save or [])
    if beside != sorted(method.modules_to_save):
        raise ConfigError(
            f"method.modules_to_save={method.modules_to_save}, but the adapter in method.init_from={method.init_from} "
            f"has {beside}; set method.modules_to_save={beside}"
        )
    wanted = method.target_modules
    if not isinstance(wanted, str) and set(wanted) != set(stored.target_modules):
        raise ConfigError(
            f"method.target_modules={wanted}, but the adapter in method.init_from={method.init_from} has "
            f"{sorted(stored.target_modules)}; leave method.target_modules out"
        )
    stored.lora_dropout = method.lora_dropout
    stored.inference_mode = False
    return PeftModel.from_pretrained(
        model, method.init_from, config=stored, is_trainable=True, autocast_adapter_dtype=False
    )


def _check_targets(model: nn.Module, config: Config) -> None:
    """PEFT is content when one name of the list matches; a typo in another would train less than asked."""
    method = config.method
    modules = [name for name, _ in model.named_modules()]
    listed = {"modules_to_save": method.modules_to_save}
    if not isinstance(method.target_modules, str):
        listed["target_modules"] = method.target_modules
    for key, names in listed.items():
        for target in names:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                leaves = sorted(
                    {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
                )
                raise ConfigError(
                    f"method.{key}={names}: {target} is no module of {config.model.name}; "
                    f"its linear ones are {', '.join(leaves)}"
                )


def export_names(model: nn.Module) -> dict[str, str]:
    """Returns, for every trained parameter, the key under which it is exported.

    For an adapter PEFT itself is asked, with a marker in place of each tensor, so that its naming rules hold.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    markers = {name: torch.tensor(index) for index, name in enumerate(names)}
    # "auto" would ask the hub whether the base's embedding has been resized.
    renamed = get_peft_model_state_dict(model, state_dict=markers, adapter_name=ADAPTER, save_embedding_layers=False)
    return {names[int(marker)]: key for key, marker in renamed.items()}


def save_adapter_config(model: Any, config: Config, directory: Path) -> None:
    """Writes adapter_config.json for inference, naming the base as the user did, not the local copy of it."""
    adapter = model.peft_config[ADAPTER]
    adapter.inference_mode = True
    adapter.base_model_name_or_path = config.model.name
    adapter.revision = config.model.commit or config.model.revision
    adapter.save_pretrained(directory)


def load_adapter(model: nn.Module, directory: Path) -> Any:
    """Wraps a loaded base model with an exported adapter."""
    return PeftModel.from_pretrained(model, str(directory), autocast_adapter_dtype=False)
