"""LoRA through PEFT: attach, name for export, load back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

from dist_ft.config import Config
from dist_ft.config.adapter_settings import FREE, adapter_settings, same
from dist_ft.config.training_sections import MethodConfig
from dist_ft.errors import ConfigError

ADAPTER = "default"
_UNDERSTOOD = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "runtime_config",
    }
)  # fmt: skip
"""Keys of PEFT's LoraConfig that an adapter to go on from may set."""


def lora_config(config: Config) -> LoraConfig:
    """Returns PEFT's config for `method`; PEFT itself sets the base model's name, and warns if one was there."""
    method = config.method
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=method.r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        target_modules=method.target_modules,
        layers_to_transform=method.layers_to_transform,
        modules_to_save=list(method.modules_to_save) or None,
    )


def attach_adapter(model: nn.Module, config: Config) -> Any:
    """Wraps the base model with LoRA matrices in the base's dtype; only they require gradients.

    The matrices depend on `run.seed` alone.

    Raises:
        ConfigError: `method.target_modules` names no module, or `method.init_from` does not fit.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(config.run.seed)
    # DoRA starts from the lengths of the base's vectors; PEFT gathers a model that is cut while transformers says so.
    is_cut = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    said = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if is_cut and config.method.use_dora else None
    try:
        if config.method.init_from is not None:
            return _load_start(model, config.method)
        _check_targets(model, config)
        _check_layers(model, config)
        with _without_warnings():
            return get_peft_model(model, lora_config(config), autocast_adapter_dtype=False)
    except ConfigError:
        raise
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
        method = config.method
        used = {"init_from": method.init_from, "modules_to_save": method.modules_to_save}
        key, value = next(((k, v) for k, v in used.items() if v), ("target_modules", method.target_modules))
        raise ConfigError(f"method.{key}={value} does not fit {config.model.name}: {error}") from error
    finally:
        del said  # transformers keeps a weak reference
        torch.random.set_rng_state(state)


def _load_start(model: nn.Module, method: MethodConfig) -> Any:
    assert method.init_from is not None
    _check_settings(method, method.init_from)
    stored = PeftConfig.from_pretrained(method.init_from)
    _check_kind(stored, method.init_from)
    stored.lora_dropout = method.lora_dropout
    stored.inference_mode = False
    with _without_warnings():
        return PeftModel.from_pretrained(
            model, method.init_from, config=stored, is_trainable=True, autocast_adapter_dtype=False
        )


def _check_settings(method: MethodConfig, directory: str) -> None:
    """`method` says what is trained, so it must say what the adapter is; `all-linear` stands for the adapter's own."""
    for key, theirs in adapter_settings(directory).items():
        if key == "base_model_name_or_path" or key in FREE:
            continue
        mine = getattr(method, key)
        if not same(mine, theirs) and not (key == "target_modules" and mine == "all-linear"):
            raise ConfigError(
                f"method.{key}={mine}, but the adapter in method.init_from={directory} has {key}={theirs}; "
                f"set method.{key}={theirs}"
            )


def _check_kind(stored: PeftConfig, directory: str) -> None:
    """Refuses what changes the base model, or the computation in ways that an export does not carry."""
    plain = LoraConfig()
    odd = {f.name: getattr(stored, f.name) for f in fields(plain) if f.name not in _UNDERSTOOD}
    odd = {key: value for key, value in odd.items() if value != getattr(plain, key)}
    if stored.init_lora_weights not in (True, False, "gaussian"):
        odd["init_lora_weights"] = stored.init_lora_weights
    if odd:
        key, value = sorted(odd.items())[0]
        raise ConfigError(
            f"method.init_from={directory}: the adapter has {key}={value}, which is not supported; merge it into the "
            "base model with PEFT and train on that"
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


def _check_layers(model: Any, config: Config) -> None:
    wanted, number = config.method.layers_to_transform or [], model.config.get_text_config().num_hidden_layers
    if wanted and max(wanted) >= number:
        raise ConfigError(
            f"method.layers_to_transform={wanted}: the layers of {config.model.name} are 0 to {number - 1}"
        )


def adapter_hash(directory: str) -> str:
    """Returns a hash of what an adapter on disk computes: its settings and its weights, wherever it lies."""
    hasher = xxhash.xxh3_128(repr(sorted(adapter_settings(directory).items())).encode())
    with (Path(directory) / "adapter_model.safetensors").open("rb") as stream:
        while block := stream.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


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
    with _without_warnings():
        return PeftModel.from_pretrained(model, str(directory), autocast_adapter_dtype=False)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences two warnings of a wrapped model that a user can do nothing about."""
    with warnings.catch_warnings():
        # PEFT 0.19 asks for a property that transformers 5 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # A skeleton holds no values, so an adapter's are not copied.
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter in the checkpoint to", UserWarning)
        yield
