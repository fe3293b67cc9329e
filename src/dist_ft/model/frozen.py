"""A frozen model beside the one that is trained: the reference of a preference loss, or a teacher.

It never runs in the ranks. A task loads it, writes what it says about token shards, and ends (`jobs/score.py`).
"""

from __future__ import annotations

from pathlib import Path

from dist_ft.config import Config
from dist_ft.errors import ConfigError
from dist_ft.model.adapter import Model, adapter_hash, load_adapter
from dist_ft.model.base import fingerprint, load_model, load_tokenizer


def frozen_config(config: Config, name: str | None) -> Config:
    """Return the config of a frozen model: its base is `model`, its adapter `method.init_from`.

    Args:
        config: The run config.
        name: A model as in `model.name`, or the directory of an adapter of the run's base model; None is the model of
            the run's first step, before any update.
    """
    if name is None:
        return config
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        return config.model_copy(update={"method": config.method.model_copy(update={"init_from": str(path)})})
    model = config.model.model_copy(update={"name": name, "revision": None, "commit": None, "config_overrides": {}})
    return config.model_copy(update={"model": model, "method": config.method.model_copy(update={"init_from": None})})


def frozen_key(frozen: Config) -> str:
    """Return a key of everything that changes what a frozen model says: weights, dtype, kind of attention."""
    adapter = frozen.method.init_from
    weights = [fingerprint(frozen), *([adapter_hash(adapter)] if adapter else [])]
    return " ".join([*weights, frozen.model.torch_dtype, frozen.model.attention])


def load_frozen(frozen: Config) -> Model:
    """Load a frozen model for inference, on the CPU."""
    model = load_model(frozen)
    adapter = frozen.method.init_from
    return (load_adapter(model, Path(adapter)) if adapter else model).eval()


def check_same_tokens(config: Config, frozen: Config, setting: str) -> None:
    """Check that a frozen model means the same tokens as the one that is trained; sizes alone would not show it.

    Args:
        config: The run config.
        frozen: Config of the frozen model.
        setting: Key that names it, for the message.

    Raises:
        ConfigError: It has other tokens.
        ModelError: There is no such model.
    """
    if frozen.model.name == config.model.name:
        return
    mine, theirs = load_tokenizer(config).get_vocab(), load_tokenizer(frozen).get_vocab()
    if mine == theirs:
        return
    other = min(mine.items() ^ theirs.items(), key=lambda item: item[1])
    raise ConfigError(
        f"{setting}={frozen.model.name} has other tokens than model.name={config.model.name} ({len(theirs)} and "
        f"{len(mine)}; {other[0]!r} is one that differs), so its probabilities say nothing about them; name a model "
        "with the same tokenizer"
    )
