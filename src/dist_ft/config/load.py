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

from dist_ft.config.schema import Config
from dist_ft.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `3e-4` is a number, `on` and `no` are words, doubled keys are errors."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = key_node.value
        if key in seen:
            line = key_node.start_mark.line + 1
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} stands twice (line {line}); keep one", key_node.start_mark
            )
        seen.add(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value
    }  # type: ignore[no-untyped-call]


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


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
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems.extend(_explain(item, path) for item in error.errors())
        config = None
    if problems or config is None:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return config


def config_from_dict(data: Mapping[str, Any]) -> Config:
    """Rebuilds a checked config from `Config.model_dump(mode="json")`, as sent to other processes."""
    return Config.model_validate(data)


def dump_yaml(config: Config) -> str:
    """Returns the resolved config as YAML, in schema order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds {type(raw).__name__}, expected sections such as `model:` and `data:`"
        )
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not key=value; write for example optimizer.lr=3e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
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


def _explain(item: Any, path: Path) -> str:
    """Turns one pydantic error into: key, both values, what to do."""
    location = [part for part in item["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location)
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"
            if near
            else f"known: {', '.join(known)}"
        )
        return f"{key}: unknown key in {path}; {hint}"
    if kind == "missing":
        return f"{key}: missing in {path}; {_doc(location)}"
    if kind == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    message = str(item["msg"])[0].lower() + str(item["msg"])[1:].removeprefix("Input s")
    return f"{key}={value!r} ({type(value).__name__}): {message}; {_doc(location)}".rstrip("; ")


def _is_union_tag(part: object) -> bool:
    """Pydantic adds the tried member of a union to the location; users never wrote that."""
    return (
        isinstance(part, str)
        and not re.fullmatch(r"[a-z_][a-z_0-9]*", part)
        or part in ("int", "float", "str")
    )


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
    return f"{parents[-1]}: {field.description}" if field and field.description else ""
