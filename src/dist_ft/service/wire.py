"""Defines the forms that every answer shares: JSON values, the error form, pages, ids; records of the store."""

from __future__ import annotations

import hashlib
import math
import secrets
import string
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from dist_ft.storage.publish import read_json
from dist_ft.typed_json import from_json

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""A value of a body, as it was parsed and not yet checked."""
Object = dict[str, Json]
"""A JSON object."""

_LETTERS = string.ascii_letters + string.digits
_LARGEST = sys.float_info.max  # an int may be larger than any float
T = TypeVar("T")


class ApiError(Exception):
    """An answer in the API's error form.

    Attributes:
        status: HTTP status.
        message: What a person reads.
        param: The parameter that is wrong, if one is.
        code: Machine-readable cause.
        kind: The error's `type`.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind
        self.headers: dict[str, str] = {}

    def body(self) -> Object:
        """Return the body: always four members."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return an error of status 400."""
    return ApiError(400, message, param, code)


def new_id(prefix: str, length: int = 24) -> str:
    """Return a random id such as `file-x1Y…`."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


def made_id(prefix: str, *parts: str) -> str:
    """Return the id that follows from what it is for, so that making it twice changes nothing."""
    return prefix + hashlib.sha256("/".join(parts).encode()).hexdigest()[:24]


def page(rows: Sequence[Object], has_more: bool) -> Object:
    """Return a page of objects that have ids."""
    ends = (rows[0]["id"], rows[-1]["id"]) if rows else (None, None)
    return {"object": "list", "data": list(rows), "has_more": has_more, "first_id": ends[0], "last_id": ends[1]}


def as_int(value: Json, param: str, low: int, high: int) -> int:
    """Return a whole number between two bounds.

    Raises:
        ApiError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_request(
            f"Invalid value for '{param}': {shown(value)}, expected an integer from {low} to {high}.", param
        )
    return value


def whole_number(text: str) -> int | None:
    """Return the number that a text of up to 18 ASCII digits spells; None if it is something else.

    `str.isdigit` takes `²`, too, which is no number for `int`, and `int` refuses thousands of digits.
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def as_number(value: Json, param: str, above: float, most: float = math.inf) -> float:
    """Return a finite number above a bound.

    Raises:
        ApiError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= min(most, _LARGEST):
        upto = "" if most == math.inf else f" and at most {most:g}"
        raise bad_request(
            f"Invalid value for '{param}': {shown(value)}, expected a number above {above:g}{upto}.", param
        )
    return float(value)


def as_text(value: Json, param: str, longest: int, shortest: int = 1) -> str:
    """Return a text of a limited length.

    Raises:
        ApiError: It is something else.
    """
    if not isinstance(value, str):
        raise bad_request(f"Invalid type for '{param}': expected a string, but got {shown(value)} instead.", param)
    if not shortest <= len(value) <= longest:
        raise bad_request(
            f"Invalid '{param}': expected {shortest} to {longest} characters, but got a string of {len(value)}.", param
        )
    if "\x00" in value:
        raise bad_request(f"Invalid '{param}': it holds a null character.", param)
    return value


def as_object(value: Json, param: str) -> Object:
    """Return a JSON object.

    Raises:
        ApiError: It is something else.
    """
    if not isinstance(value, dict):
        raise bad_request(f"Invalid type for '{param}': expected an object, but got {shown(value)} instead.", param)
    return value


def refuse_unknown(value: Object, known: Iterable[str], param: str | None = None) -> None:
    """Refuse members that have no meaning here.

    Raises:
        ApiError: There is one.
    """
    allowed = list(known)
    for key in value:
        if key not in allowed:
            name = f"{param}.{key}" if param else key
            raise bad_request(
                f"Unrecognized request argument supplied: {name[:100]}. Known: {', '.join(allowed)}.",
                param or key[:100],
            )


def shown(value: Json, most: int = 80) -> str:
    """Return a value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"


def read_record(cls: type[T], path: Path) -> T:
    """Return a dataclass that `write_json` has written."""
    data = read_json(path)
    del data["format_version"]
    return from_json(cls, data)
