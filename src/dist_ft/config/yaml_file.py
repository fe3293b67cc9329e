"""Reads and writes YAML 1.2 and applies `a.b=value` overrides."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from dist_ft.errors import ConfigError

Yaml = None | bool | int | float | str | list["Yaml"] | dict[str, "Yaml"]
"""The content of a file or an override before it is checked as a config."""

_FLOAT = re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$")


_MAX_BYTES = 1 << 20
"""Largest config of another tool; the largest known are a few kilobytes."""


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2: `3e-4` is a number; `on`, `010`, `1:30` and dates are words. Keys must be unique."""


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


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Yaml]:
    seen: set[str] = set()
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

# Besides YAMLError, PyYAML raises these for a wrong value under an explicit tag, a number of more than 4300 digits,
# and brackets a thousand deep.
_YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def dump(data: dict[str, Yaml]) -> str:
    """Return data as YAML that `read_yaml` reads back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path, expected: str = "sections such as `model:` and `data:`") -> dict[str, Yaml]:
    """Read a YAML file whose top level is a mapping.

    Args:
        path: The file.
        expected: What an error says that the file should hold.

    Raises:
        ConfigError: The file does not exist, or is not YAML with a mapping at the top level.
    """
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
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise ConfigError(f"{path} holds {found}, expected {expected}")
    return raw


def read_plain_yaml(path: Path) -> dict[str, Yaml]:
    """Read a YAML file of another tool: of the size of a config, and with every key and value written out.

    Raises:
        ConfigError: As `read_yaml`; or the file is larger than a config, or has anchors or merge keys.
    """
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, more than a config ({_MAX_BYTES}); name a config")
    raw = read_yaml(path, "keys with values such as `learning_rate: 2e-5`; name a training config")
    for token in yaml.scan(path.read_text(encoding="utf-8"), yaml.SafeLoader):
        if isinstance(token, yaml.AnchorToken | yaml.AliasToken):
            line = token.start_mark.line + 1
            raise ConfigError(
                f"{path}:{line}: anchors (&{token.value}, *{token.value}) are not read; write the value out"
            )
        if isinstance(token, yaml.ScalarToken) and token.plain and token.value == "<<":
            raise ConfigError(f"{path}:{token.start_mark.line + 1}: merge keys (<<) are not read; write the keys out")
    if odd := [key for key in raw if not isinstance(key, str)]:
        raise ConfigError(f"{path}: key {odd[0]!r} is no word; correct it")
    return raw


def apply_override(raw: dict[str, Yaml], override: str) -> None:
    """Set one key of `raw` as `a.b=value` says; the value is YAML.

    Raises:
        ConfigError: The override is malformed.
    """
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
