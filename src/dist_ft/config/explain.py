"""Turns the errors of pydantic into lines that name the key, its value and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dist_ft.config.advice import advice_on_key, advice_on_value
from dist_ft.config.schema import Config


def explain_all(error: ValidationError, path: Path, raw: Any) -> list[str]:
    """Return one line a key: a union's members each complain, and the first speaks for them."""
    lines: dict[str, str] = {}
    for item in error.errors():
        key = ".".join(map(str, _written_location(item, raw)))
        lines.setdefault(key or str(item["msg"]), _explain(item, path, raw))
    return list(lines.values())


def _explain(item: Any, path: Path, raw: Any) -> str:
    """Turns one pydantic error into: key, both values, what to do."""
    location = _written_location(item, raw)
    kind, value = item["type"], item.get("input")
    if kind == "union_tag_invalid":  # of the optimizers, which are told apart by their kind
        location, value = [*location, "kind"], item["ctx"]["tag"]
    key = ".".join(str(part) for part in location)
    advice = advice_on_key(str(location[-1])) if kind == "extra_forbidden" else advice_on_value(key, value)
    if advice is not None:
        return f"{key}{'' if kind == 'extra_forbidden' else f'={value}'}: {advice}"
    if kind == "extra_forbidden":
        model = _model_at(location[:-1], raw)
        known = list(model.model_fields) if model else []
        near = difflib.get_close_matches(str(location[-1]).strip().lower().replace("-", "_"), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?" if near else f"known: {', '.join(known)}"
        )
        return f"{key}: unknown key in {path}; {hint}"
    if kind == "missing":
        return f"{key}: missing in {path}; {_doc(location, raw)}"
    if kind == "value_error":
        text = str(item["msg"]).removeprefix("Value error, ")
        return f"{key}: {text}" if key and key not in text else text
    message = str(item["msg"])[0].lower() + str(item["msg"])[1:]
    if kind == "union_tag_invalid":
        message = f"input should be one of {item['ctx']['expected_tags']}"
    return f"{key}={_short(value)} ({type(value).__name__}): {message}; {_doc(location, raw)}".rstrip("; ")


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


def _model_at(location: Sequence[Any], raw: Any) -> type[BaseModel] | None:
    """Return the section at a location; of a union, the member whose `kind` the user wrote, else the first."""
    model: type[BaseModel] = Config
    node = raw
    for part in location:
        node = node[part] if isinstance(node, list) or (isinstance(node, dict) and part in node) else None
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        members = _models_in(field.annotation) if field is not None else []
        if not members:
            return None
        kind = node.get("kind") if isinstance(node, dict) else None
        named = (member for member in members if "kind" in member.model_fields and kind is not None)
        model = next((member for member in named if member.model_fields["kind"].default == kind), members[0])
    return model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _doc(location: Sequence[Any], raw: Any) -> str:
    parents = [part for part in location if not isinstance(part, int)]
    model = _model_at(location[:-1], raw) if parents else None
    field = model.model_fields.get(str(parents[-1])) if model else None
    return f"{parents[-1]}: {' '.join(field.description.split())}" if field and field.description else ""
