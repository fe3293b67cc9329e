"""A frozen model beside the one that is trained: the reference of a preference loss, or a teacher.

It never runs in the ranks. A task loads it, writes what it says about token shards, and ends (`jobs/score.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_ft.config import Config
from dist_ft.config.adapter_settings import adapter_settings
from dist_ft.config.training_sections import SpecialTokens
from dist_ft.errors import ConfigError, UserError
from dist_ft.model.adapter import Model, adapter_hash, attach_adapter
from dist_ft.model.base import check_length, check_weights, fingerprint, load_model, load_tokenizer, skeleton


def frozen_config(config: Config, name: str | None, revision: str | None = None, is_of_run: bool = True) -> Config:
    """Return the config of a frozen model: its base is `model`, its adapter `method.init_from`.

    Args:
        config: The run config.
        name: A model as in `model.name`, or the directory of an adapter; None is the model of the run's first step,
            before any update.
        revision: Branch, tag or commit of a model on a hub.
        is_of_run: Whether an adapter belongs to the run's base model, rather than to the one that it names.
    """
    if name is None:
        return config
    path, base, method = Path(name).expanduser(), name, config.method.model_copy(update={"init_from": None})
    if (path / "adapter_config.json").is_file():
        settings = adapter_settings(str(path))
        base = str(settings.pop("base_model_name_or_path") or "")
        if not base and not is_of_run:
            raise ConfigError(f"method.init_from={name}: adapter_config.json names no base model; write it there")
        method = config.method.model_copy(update={**settings, "kind": "lora", "init_from": str(path)})
        if is_of_run:
            return config.model_copy(update={"method": method})
    changes: dict[str, Any] = {
        "name": base, "revision": revision, "commit": None, "config_overrides": {}, "special_tokens": SpecialTokens(),
        "quantization": None,
    }  # fmt: skip
    return config.model_copy(update={"model": config.model.model_copy(update=changes), "method": method})


def frozen_key(frozen: Config) -> str:
    """Return a key of everything that changes what a frozen model says: weights, dtype, kind of attention."""
    adapter = frozen.method.init_from
    weights = [fingerprint(frozen), *([adapter_hash(adapter)] if adapter else [])]
    return " ".join([*weights, frozen.model.torch_dtype, frozen.model.attention])


def load_frozen(frozen: Config) -> Model:
    """Load a frozen model for inference, on the CPU."""
    model = load_model(frozen)
    return (attach_adapter(model, frozen) if frozen.method.init_from else model).requires_grad_(False).eval()


@contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Let errors about a frozen model name the key of the config that names it.

    Args:
        setting: The key.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(r"\b(model\.name|method\.init_from)=", f"{setting}=", str(error))) from error


def check_frozen(frozen: Config) -> None:
    """Check that a frozen model would load, and takes sequences of `data.seq_len` tokens. No weight is loaded.

    Raises:
        UserError: It would not.
    """
    check_length(frozen)
    check_weights(frozen)
    if frozen.method.init_from:
        attach_adapter(skeleton(frozen), frozen)


def check_same_tokens(config: Config, frozen: Config, setting: str) -> None:
    """Check that a frozen model means the tokens of the one that is trained; sizes alone would not show a difference.

    Args:
        config: The run config.
        frozen: Config of the frozen model.
        setting: Key that names it, for the message.

    Raises:
        ConfigError: It has other tokens.
        ModelError: Its tokenizer cannot be read.
    """
    if frozen.model == config.model:  # name, revision, commit and special tokens: the model of the run itself
        return
    mine, theirs = load_tokenizer(config).get_vocab(), load_tokenizer(frozen).get_vocab()
    if mine == theirs:
        return
    other = min(mine.items() ^ theirs.items(), key=lambda item: item[1])
    raise ConfigError(
        f"{setting}={frozen.model.name} has other tokens than model.name={config.model.name} ({len(theirs)} and "
        f"{len(mine)}; {other[0]!r} is one that differs), so its probabilities say nothing about them; name a model "
        "with the same tokenizer, or train on its answers (`dist-ft data distill`)"
    )
