"""Reads a config from a YAML file and `a.b=value` overrides, and reports all problems at once.

Kept free of heavy imports: a typo must be answered in well under half a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from dist_ft.config.advice import TOKEN, import_hint, keys_with_secrets
from dist_ft.config.explain import explain_all
from dist_ft.config.paths import is_pattern
from dist_ft.config.schema import Config
from dist_ft.config.training_sections import DistillConfig, DpoConfig, KtoConfig
from dist_ft.config.yaml_file import Yaml, apply_override, dump, read_yaml
from dist_ft.errors import ConfigError
from dist_ft.storage.urls import is_url


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a run config.

    Args:
        path: YAML file.
        overrides: `a.b=value` with YAML values, applied in order.

    Raises:
        ConfigError: The config has problems; the message has one line for each.
    """
    raw = read_yaml(path)
    if hint := import_hint(str(path), raw):
        raise ConfigError(hint)
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(raw, override)
        except ConfigError as error:
            problems.append(str(error))
    if secret := list(keys_with_secrets(raw)):  # before anything that would show a value
        raise ConfigError("\n".join(f"{key} holds a token or the user info of a URL; {TOKEN}" for key in secret))
    # A section whose keys are all commented out counts as empty.
    raw = {key: {} if value is None and key in Config.model_fields else value for key, value in raw.items()}
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems.extend(explain_all(error, path, raw))
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def problems_in(raw: dict[str, Yaml], path: Path) -> list[str]:
    """Return what is wrong with the content of a config, one line a key; `path` is named in them."""
    try:
        Config.model_validate(raw)
    except ValidationError as error:
        return explain_all(error, path, raw)
    return []


def with_absolute_paths(config: Config) -> Config:
    """Return the config with every local path made absolute, for a process in another directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or not Path(path).expanduser().exists() else str(Path(path).expanduser().absolute())

    def placed(path: str | None) -> str | None:
        """Make a path absolute even if nothing is there yet."""
        return path if path is None or is_url(path) else str(Path(path).expanduser().absolute())

    def found(source: str) -> str | None:
        """Make a source absolute: a file, a folder or a pattern."""
        return placed(source) if is_pattern(source) and not is_url(source) else absolute(source)

    data = config.data
    sources = [s.model_copy(update={"source": found(s.source)}) for s in data.train]
    held_out = data.held_out_at([found(source.source) for source in data.eval_sources.values()])
    template = absolute(data.template_path) or data.chat_template
    replicas = [placed(replica) for replica in data.loader.replicas]
    loader = data.loader.model_copy(update={"cache_dir": placed(data.loader.cache_dir), "replicas": replicas})
    changes = {
        "train": sources, "eval": held_out, "chat_template": template, "cache_dir": placed(data.cache_dir),
        "loader": loader,
    }  # fmt: skip
    objective = config.objective
    if isinstance(objective, DpoConfig | KtoConfig):
        objective = objective.model_copy(update={"reference": absolute(objective.reference)})
    elif isinstance(objective, DistillConfig):
        objective = objective.model_copy(update={"teacher": absolute(objective.teacher)})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": placed(config.run.output_dir)}),
            "model": config.model.model_copy(update={"name": absolute(config.model.name)}),
            "objective": objective,
            "method": config.method.model_copy(update={"init_from": absolute(config.method.init_from)}),
            "data": data.model_copy(update=changes),
        }
    )


def with_commit(config: Config, commit: str | None) -> Config:
    """Return the config with its hub model pinned to a commit."""
    return config.model_copy(update={"model": config.model.model_copy(update={"commit": commit})})


def with_model_dir(config: Config, directory: str, dtype: str | None = None) -> Config:
    """Return the config with the model in a directory as it is, without revision, commit and quantisation."""
    plain = {"revision": None, "commit": None, "quantization": None}
    changes = {"name": directory, **plain, "dtype": dtype or config.model.dtype}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def config_from_dict(data: dict[str, Yaml]) -> Config:
    """Rebuilds a checked config from `Config.model_dump(mode="json")`, as sent to other processes.

    Raises:
        ConfigError: The data is not a config.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def dump_yaml(config: Config) -> str:
    """Return the resolved config as YAML, in schema order."""
    return dump(config.model_dump(mode="json"))


def dump_set_keys(config: Config) -> str:
    """Return the keys that the user set as YAML, for another machine that reads them as the user's.

    Keys that were left out stay left out, because an adapter may settle them (`with_adapter_settings`).
    """
    return dump(config.model_dump(mode="json", exclude_unset=True))


def schema_json() -> str:
    """Return the JSON schema of the config, field docs included."""
    return json.dumps(Config.model_json_schema(), indent=2)
