"""Attaches LoRA adapters through PEFT, names their tensors for export, and loads them back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
import xxhash
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

from dist_ft.config import Config
from dist_ft.config.adapter_settings import FREE, adapter_settings, same
from dist_ft.config.training_sections import MethodConfig
from dist_ft.errors import ConfigError, ModelError
from dist_ft.model.base import quantisation_of
from dist_ft.model.intact import check_present, check_weight_file

Model = PreTrainedModel | PeftModel
"""A model, perhaps with an adapter."""
ADAPTER = "default"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_UNDERSTOOD = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "use_rslora", "use_dora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "runtime_config",
    }
)  # fmt: skip
"""Keys of PEFT's LoraConfig that an adapter in `method.init_from` may set."""

_HARMLESS = (
    "`is_gradient_checkpointing` is deprecated",  # PEFT asks transformers under the old name
    ".*copying from a non-meta parameter in the checkpoint to",  # a skeleton holds no values
    "fan_in_fan_out is set to False but the target module is `Conv1D`",  # and it is then set to True
    "Adapter .* was active which is now deleted",
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",  # exports of such models are tested
)


@contextmanager
def without_harmless_warnings() -> Iterator[None]:
    """Silence warnings of PEFT that a user can do nothing about."""
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        yield


def attach_adapter(model: PreTrainedModel, config: Config) -> PeftModel:
    """Wrap the base model with LoRA matrices in the base's dtype; only they require gradients.

    The matrices depend on `run.seed` alone.

    Raises:
        ConfigError: `method.target_modules` names no module, or `method.init_from` does not fit.
    """
    state = torch.random.get_rng_state()
    torch.manual_seed(config.run.seed)
    method = config.method
    # DoRA starts from the lengths of the base's vectors. PEFT gathers a sharded model only if transformers says that
    # DeepSpeed runs at stage 3.
    is_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    stage_3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if is_sharded and method.use_dora else None
    try:
        if method.init_from is not None:
            start = _start_config(method, method.init_from)
            weights = Path(method.init_from) / ADAPTER_WEIGHTS
            check_present(weights.parent, f"method.init_from={method.init_from}")
            check_weight_file(weights, f"method.init_from={method.init_from}")
            with without_harmless_warnings():
                started = PeftModel.from_pretrained(
                    model, method.init_from, config=start, is_trainable=True, autocast_adapter_dtype=False
                )
            _check_stored(started, weights, method.init_from)
            return _in_dtype(started, config)
        _check_names(model, config)
        lora = LoraConfig(  # the base's name is written at export
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
        with without_harmless_warnings():
            return _in_dtype(get_peft_model(model, lora, autocast_adapter_dtype=False), config)
    except (ConfigError, ModelError):
        raise
    except (ValueError, RuntimeError, KeyError, OSError, TypeError, SafetensorError) as error:
        used = {"init_from": method.init_from, "modules_to_save": method.modules_to_save}
        key, value = next(((k, v) for k, v in used.items() if v), ("target_modules", method.target_modules))
        raise ConfigError(f"method.{key}={value} does not fit {config.model.name}: {error}") from error
    finally:
        del stage_3  # transformers keeps a weak reference
        torch.random.set_rng_state(state)


def _in_dtype(model: PeftModel, config: Config) -> PeftModel:
    """Return the model with an adapter in `model.dtype`, which PEFT cannot read off a quantised layer."""
    if quantisation_of(config) is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.model.torch_dtype))
    return model


def _check_stored(model: PeftModel, weights: Path, directory: str) -> None:
    """Check that an adapter's file holds its tensors under PEFT's names; PEFT would begin at random with a warning.

    Raises:
        ConfigError: A tensor is missing, or one has no place in the model.
    """
    with safe_open(str(weights), framework="pt") as file:
        stored = set(file.keys())
    wanted = set(export_names(model).values())
    missing, unknown = sorted(wanted - stored), sorted(key for key in stored - wanted if "lora_" in key)
    if missing or unknown:
        odd, what = (missing[0], "lacks") if missing else (unknown[0], "has, without a place in the model,")
        raise ConfigError(
            f"method.init_from={directory}: {weights.name} {what} {odd} ({len(missing)} of {len(wanted)} tensors are "
            f"missing, {len(unknown)} have no place); write it with PEFT's save_pretrained"
        )


def _start_config(method: MethodConfig, directory: str) -> PeftConfig:
    """Return the config of the adapter that training starts from.

    Raises:
        ConfigError: The adapter is not what `method` says, or computes what an export does not carry.
    """
    for key, theirs in adapter_settings(directory).items():
        if key == "base_model_name_or_path" or key in FREE:
            continue
        mine = getattr(method, key)
        # `all-linear` stands for whatever the adapter has.
        if not same(mine, theirs) and not (key == "target_modules" and mine == "all-linear"):
            raise ConfigError(
                f"method.{key}={mine}, but the adapter in method.init_from={directory} has {key}={theirs}; "
                f"set method.{key}={theirs}"
            )
    stored, plain = PeftConfig.from_pretrained(directory), LoraConfig()
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
    stored.lora_dropout = method.lora_dropout
    stored.inference_mode = False
    return stored


def _check_names(model: PreTrainedModel, config: Config) -> None:
    """Check that the model has every module and layer that `method` names.

    PEFT is content when one name of a list matches; a typo in another would train less than asked.
    """
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
    wanted, number = method.layers_to_transform or [], model.config.get_text_config().num_hidden_layers
    if wanted and max(wanted) >= number:
        raise ConfigError(
            f"method.layers_to_transform={wanted}: the layers of {config.model.name} are 0 to {number - 1}"
        )


def adapter_hash(directory: str) -> str:
    """Return a hash of an adapter's settings and weights, the same wherever it lies."""
    hasher = xxhash.xxh3_128(repr(sorted(adapter_settings(directory).items())).encode())
    with (Path(directory) / ADAPTER_WEIGHTS).open("rb") as stream:
        while block := stream.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def export_names(model: nn.Module) -> dict[str, str]:
    """Return the key under which each trained parameter is exported.

    PEFT itself names the tensors of an adapter: it gets a marker in place of each one, so that its own rules hold.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not isinstance(model, PeftModel):
        return {name: name for name in names}
    markers = {name: torch.tensor(index) for index, name in enumerate(names)}
    # "auto" would ask the hub whether the base's embedding has been resized.
    renamed = get_peft_model_state_dict(model, state_dict=markers, adapter_name=ADAPTER, save_embedding_layers=False)
    return {names[int(marker)]: key for key, marker in renamed.items()}


def save_adapter_config(model: PeftModel, config: Config, directory: Path, base_name: str | None = None) -> None:
    """Write adapter_config.json for inference.

    It names the base model as the user did, not our local copy, or by `base_name`, of which no revision is known.
    """
    adapter = model.peft_config[ADAPTER]
    adapter.inference_mode = True
    adapter.base_model_name_or_path = base_name or config.model.name
    adapter.revision = None if base_name else config.model.commit or config.model.revision
    adapter.save_pretrained(directory)


def load_adapter(model: PreTrainedModel, directory: Path, name: str = ADAPTER) -> PeftModel:
    """Wrap a loaded base model with an exported adapter."""
    with without_harmless_warnings():
        return PeftModel.from_pretrained(model, str(directory), adapter_name=name, autocast_adapter_dtype=False)


def load_another(model: PeftModel, directory: Path, name: str) -> None:
    """Load a further adapter beside those that a model has."""
    with without_harmless_warnings():
        model.load_adapter(str(directory), adapter_name=name, autocast_adapter_dtype=False)
