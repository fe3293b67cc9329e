"""Reads a config: a YAML file plus `a.b=value` overrides, checked at once and reported at once.

Kept free of heavy imports: a typo must be answered in well under half a second.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dist_ft.config.advice import TOKEN, advice_on_key, advice_on_value, keys_with_secrets
from dist_ft.config.rules import is_pattern
from dist_ft.config.schema import Config, RowSource
from dist_ft.errors import ConfigError
from dist_ft.storage.urls import is_url

_FLOAT = re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `3e-4` is a number; `on`, `010`, `1:30` and dates are words; keys stand once."""


_Loader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"^<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or `_Loader` would not read as a string."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line breaks of YAML 1.1 that 1.2 does not know: only double quotes keep them.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key that is no word (line {line})", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice (line {line}); keep one", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


# Besides its own: what PyYAML's constructors raise for a wrong value under an explicit tag, a number of more
# than 4300 digits, and brackets a thousand deep.
_YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a run config.

    Args:
        path: YAML file.
        overrides: `a.b=value` with YAML values, applied in order.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    raw = _read_yaml(path)
    problems: list[str] = []
    for override in overrides:
        try:
            _apply_override(raw, override)
        except ConfigError as error:
            problems.append(str(error))
    if secret := list(keys_with_secrets(raw)):  # before anything that would show a value
        raise ConfigError("\n".join(f"{key} holds a token or the user info of a URL; {TOKEN}" for key in secret))
    # A section whose keys are all commented out is an empty one.
    raw = {key: {} if value is None and key in Config.model_fields else value for key, value in raw.items()}
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems.extend(_explain_all(error, path, raw))
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def with_absolute_paths(config: Config) -> Config:
    """Returns the config with every local path made absolute, for whoever reads it in another directory."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or not Path(path).expanduser().exists() else str(Path(path).expanduser().absolute())

    def placed(path: str | None) -> str | None:
        """Of what is yet to be made, too."""
        return path if path is None or is_url(path) else str(Path(path).expanduser().absolute())

    def found(source: str) -> str | None:
        """A file or folder, or a pattern, which is no path itself."""
        return placed(source) if is_pattern(source) and not is_url(source) else absolute(source)

    data = config.data
    sources = [s.model_copy(update={"source": found(s.source)}) for s in data.train]
    held_out = found(data.eval) if isinstance(data.eval, str) else data.eval
    if isinstance(held_out, RowSource):
        held_out = held_out.model_copy(update={"source": found(held_out.source)})
    template = absolute(data.template_path) or data.chat_template
    replicas = [placed(replica) for replica in data.loader.replicas]
    loader = data.loader.model_copy(update={"cache_dir": placed(data.loader.cache_dir), "replicas": replicas})
    changes = {
        "train": sources, "eval": held_out, "chat_template": template, "cache_dir": placed(data.cache_dir),
        "loader": loader,
    }  # fmt: skip
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"output_dir": placed(config.run.output_dir)}),
            "model": config.model.model_copy(update={"name": absolute(config.model.name)}),
            "method": config.method.model_copy(update={"init_from": absolute(config.method.init_from)}),
            "data": data.model_copy(update=changes),
        }
    )


def with_commit(config: Config, commit: str | None) -> Config:
    """Returns the config with its hub model held at a commit."""
    return config.model_copy(update={"model": config.model.model_copy(update={"commit": commit})})


def with_model_dir(config: Config, directory: str, dtype: str | None = None) -> Config:
    """Returns the config with the model of a directory in place of its own, which has no revision and no commit."""
    changes = {"name": directory, "revision": None, "commit": None, "dtype": dtype or config.model.dtype}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Rebuilds a checked config from `Config.model_dump(mode="json")`, as sent to other processes.

    Raises:
        ConfigError: It is not one.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def dump_yaml(config: Config) -> str:
    """Returns the resolved config as YAML, in schema order."""
    return _dump(config.model_dump(mode="json"))


def dump_set_keys(config: Config) -> str:
    """Returns the keys that were set as YAML, for a machine that reads them as if the user had written them there.

    A key that was left out stays left out: an adapter to go on from settles some of them (`with_adapter_settings`).
    """
    return _dump(config.model_dump(mode="json", exclude_unset=True))


def _dump(data: dict[str, Any]) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def schema_json() -> str:
    """Returns the JSON schema of the config, field docs included."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path} does not exist; pass the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from error
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from error
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected sections such as `model:` and `data:`")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value; write for example optimizer.lr=3e-4")
    try:
        value = yaml.load(text, _Loader)
    except _YAML_ERRORS as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is not a section but {child!r}")
        node = child
    node[last] = value


def _explain_all(error: ValidationError, path: Path, raw: Any) -> list[str]:
    """Returns one line a key: a union's members each complain, and the first speaks for them."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key = ".".join(map(str, _written_location(item, raw)))
        lines.setdefault(key or str(item["msg"]), _explain(item, path, raw))
    return list(lines.values())


def _explain(item: Any, path: Path, raw: Any) -> str:
    """Turns one pydantic error into: key, both values, what to do."""
    location = _written_location(item, raw)
    key = ".".join(str(part) for part in location)
    kind, value = item["type"], item.get("input")
    advice = advice_on_key(str(location[-1])) if kind == "extra_forbidden" else advice_on_value(key, value)
    if advice is not None:
        return f"{key}{'' if kind == 'extra_forbidden' else f'={value}'}: {advice}"
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]).strip().lower().replace("-", "_"), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        )
        return f"{key}: unknown key in {path}; {hint}"
    if kind == "missing":
        return f"{key}: missing in {path}; {_doc(location)}"
    if kind == "value_error":
        text = str(item["msg"]).removeprefix("Value error, ")
        return f"{key}: {text}" if key and key not in text else text
    message = str(item["msg"])[0].lower() + str(item["msg"])[1:]
    return f"{key}={_short(value)} ({type(value).__name__}): {message}; {_doc(location)}".rstrip("; ")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _written_location(item: Any, raw: Any) -> list[Any]:
    """Returns where the error stands in what the user wrote; pydantic also names tried members of unions."""
    location: list[Any] = []
    node = raw
    *parents, last = item["loc"] or ("",)
    for part in [*parents, last]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node))):
            node = node[part]
        elif part is not last or item["type"] not in ("missing", "invalid_key"):
            continue
        location.append(part)
    return location


def _model_at(location: Sequence[Any]) -> type[BaseModel] | None:
    model: type[BaseModel] = Config
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        if field is None:
            return None
        found = _model_in(field.annotation)
        if found is None:
            return None
        model = found
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _model_in(arg))), None)


def _known_keys(location: Sequence[Any]) -> list[str]:
    model = _model_at(location)
    return list(model.model_fields) if model else []


def _doc(location: Sequence[Any]) -> str:
    parents = [part for part in location if not isinstance(part, int)]
    model = _model_at(parents[:-1]) if parents else None
    field = model.model_fields.get(str(parents[-1])) if model else None
    return f"{parents[-1]}: {' '.join(field.description.split())}" if field and field.description else ""
