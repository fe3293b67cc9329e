"""Builds frozen dataclasses from parsed JSON, so that an object from outside becomes a type at the door.

`dataclasses.asdict` is the way out. Values themselves are not checked: what is read here was written by dist-ft.
"""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_json(cls: type[T], data: Any) -> T:
    """Return a dataclass with the fields of a JSON object; lists become tuples where the field is one.

    Raises:
        TypeError: A field is missing, or the object has one that the class does not know.
    """
    if not isinstance(data, dict):
        raise TypeError(f"{cls.__name__} is made from an object, not from {type(data).__name__}")
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{key: _convert(hints.get(key), value) for key, value in data.items()})


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _convert(wanted: Any, value: Any) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        if value is None or len(arguments) != 2 or type(None) not in arguments:
            return value
        return _convert(next(kind for kind in arguments if kind is not type(None)), value)
    if origin is tuple and arguments[-1] is ...:
        return tuple(_convert(arguments[0], item) for item in value)
    if origin is tuple:
        return tuple(_convert(kind, item) for kind, item in zip(arguments, value, strict=True))
    if origin is list:
        return [_convert(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _convert(arguments[1], item) for key, item in value.items()}
    if isinstance(wanted, type) and issubclass(wanted, Enum):
        return wanted(value)
    if isinstance(wanted, type) and is_dataclass(wanted) and not isinstance(value, wanted):
        return from_json(wanted, value)
    return value
