"""Turns the errors of pydantic into lines that name the key, its value and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dist_ft.config.advice import advice_on_key, advice_on_value
from dist_ft.config.schema import Config
from dist_ft.config.yaml_file import Yaml

Location = Sequence[str | int]
_NEAR = 0.7
"""Least similarity of a misspelt key to the one that is proposed; below it, a guess misleads."""


def explain_all(error: ValidationError, path: Path, raw: Yaml) -> list[str]:
    """Return one line per key. The members of a union each report an error; the first one counts."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key = ".".join(map(str, _written_location(item, raw)))
        lines.setdefault(key or item["msg"], _explain(item, path, raw))
    return list(lines.values())


def _explain(item: ErrorDetails, path: Path, raw: Yaml) -> str:
    """Turn one error into a line with the key, both values and what to do."""
    location = _written_location(item, raw)
    kind, value = item["type"], item.get("input")
    if kind == "union_tag_invalid":  # the union of the optimizers, which `kind` distinguishes
        location, value = [*location, "kind"], item["ctx"]["tag"]
    key = ".".join(map(str, location))
    advice = advice_on_key(str(location[-1])) if kind == "extra_forbidden" else advice_on_value(key, value)
    if advice is not None:
        return f"{key}{'' if kind == 'extra_forbidden' else f'={value}'}: {advice}"
    section = _section_at(location[:-1], raw) if location else None
    if kind == "extra_forbidden":
        if others := _kinds_with(location, raw):
            where = ".".join(map(str, location[:-1]))
            return f"{key}: a key of {where}.kind={' and '.join(others)} only; remove it in {path}"
        known = list(section.model_fields) if section else []
        name = str(location[-1]).strip().lower().replace("-", "_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
        if elsewhere := [] if name in known else _places_of(name, Config):
            hint = f"it is {' or '.join(elsewhere)}"
        elif near:
            hint = f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"
        else:
            hint = f"known: {', '.join(known)}"
        return f"{key}: unknown key in {path}; {hint}"
    words = [part for part in location if not isinstance(part, int)]
    field = section.model_fields.get(words[-1]) if section and words else None
    doc = f"{words[-1]}: {' '.join(field.description.split())}" if field and field.description else ""
    if kind == "missing":
        return f"{key}: missing in {path}; {doc}"
    if kind == "value_error":
        text = item["msg"].removeprefix("Value error, ")
        return f"{key}: {text}" if key and key not in text else text
    message = item["msg"][0].lower() + item["msg"][1:]
    if kind == "union_tag_invalid":
        message = f"input should be one of {item['ctx']['expected_tags']}"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{key}={shown} ({type(value).__name__}): {message}; {doc}".rstrip("; ")


def _written_location(item: ErrorDetails, raw: Yaml) -> list[str | int]:
    """Return the location of an error in the user's file; pydantic also names the members of unions that it tried."""
    location: list[str | int] = []
    node = raw
    *parents, last = item["loc"] or ("",)
    for part in [*parents, last]:
        if isinstance(node, dict) and part in node:
            node = next(value for key, value in node.items() if key == part)  # numbers may be keys
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif part is not last or item["type"] not in ("missing", "invalid_key"):
            continue
        location.append(part)
    return location


def _section_at(location: Location, raw: Yaml) -> type[BaseModel] | None:
    """Return the section at a location; for a union, the member whose `kind` the user wrote, else the nearest."""
    section: type[BaseModel] = Config
    node = raw
    is_named = False  # the next part is a name that the user chose
    for part in location:
        if isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            node = node.get(str(part)) if isinstance(node, dict) else None
        if isinstance(part, int) or is_named:
            is_named = False
            continue
        field = section.model_fields.get(part)
        is_named = field is not None and get_origin(field.annotation) is dict
        members = _members(field) if field is not None else []
        if not members:
            return None
        kind = node.get("kind") if isinstance(node, dict) else None
        of_kind = (m for m in members if kind is not None and "kind" in m.model_fields)
        keys = node.keys() if isinstance(node, dict) else set()
        nearest = max(members, key=lambda member: len(member.model_fields.keys() & keys))
        section = next((m for m in of_kind if m.model_fields["kind"].default == kind), nearest)
    return section


def _kinds_with(location: Location, raw: Yaml) -> list[str]:
    """Return the kinds of a section that have a key, for a section with several kinds."""
    if len(location) < 2:
        return []
    *above, name, key = location
    parent = _section_at(above, raw)
    field = parent.model_fields.get(str(name)) if parent else None
    members = _members(field) if field else []
    return [str(m.model_fields["kind"].default) for m in members if {"kind", key} <= m.model_fields.keys()]


def _places_of(name: str, section: type[BaseModel]) -> list[str]:
    """Return the keys of a section and its sections that have a name."""
    found = []
    for key, field in section.model_fields.items():
        if key == name:
            found.append(key)
        for member in _members(field):
            found += [f"{key}.{place}" for place in _places_of(name, member)]
    return list(dict.fromkeys(found))


def _members(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the sections that a field may hold."""
    found: list[type[BaseModel]] = []
    waiting = [field.annotation]
    while waiting:
        annotation = waiting.pop(0)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        waiting += get_args(annotation)
    return found
