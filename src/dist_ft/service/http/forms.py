"""Reads multipart forms and what files and uploads have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from dist_ft.service.api_keys import Caller
from dist_ft.service.files.shelf import PURPOSES, Shelf
from dist_ft.service.wire import ApiError, Json, as_int, bad_request, shown, whole_number

_SHORTEST_S, _LONGEST_S = 3600, 2_592_000


def check_room(shelf: Shelf, caller: Caller, size: int, max_bytes: int) -> None:
    """Refuse a file for which a project has no room.

    Raises:
        ApiError: It has none.
    """
    if shelf.bytes_of(caller.project) + size > max_bytes:
        raise ApiError(403, f"The project may hold {max_bytes} bytes of files; delete some.", None, "exceeded_quota")


@asynccontextmanager
async def form_of(request: Request) -> AsyncIterator[FormData]:
    """Open the multipart form of a request; its files lie on disk, and go in the end.

    Raises:
        ApiError: The body is no such form.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise bad_request("Expected a body of type multipart/form-data.")
    try:
        form = await request.form(max_files=4, max_fields=32)
    except (HTTPException, MultiPartException, UnicodeDecodeError, KeyError) as error:
        raise bad_request(f"The multipart body cannot be read: {getattr(error, 'detail', error)}") from error
    try:
        yield form
    finally:
        await form.close()


def purpose_of(value: Json) -> str:
    """Return a purpose that a client may give.

    Raises:
        ApiError: It is another one.
    """
    if value not in PURPOSES:
        raise bad_request(f"{shown(value, 60)} is not one of {list(PURPOSES)} - 'purpose'", "purpose")
    return str(value)


def lifetime_of(given: dict[str, Json] | dict[str, UploadFile | str | None]) -> int:
    """Return the seconds after which a file expires.

    Raises:
        ApiError: They are out of range.
    """
    seconds = given.get("seconds")
    if given.get("anchor") != "created_at":
        raise bad_request("'expires_after.anchor' must be 'created_at'.", "expires_after")
    number = whole_number(seconds) if isinstance(seconds, str) else seconds
    return as_int(number if isinstance(number, int) else None, "expires_after", _SHORTEST_S, _LONGEST_S)
