"""Routes of uploads in parts."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse

from dist_ft.service.files.shelf import Shelf, plain_name
from dist_ft.service.files.uploads import LASTS_S, MAX_PART_BYTES, MAX_UPLOAD_BYTES, Upload, Uploads
from dist_ft.service.http.forms import check_room, form_of, lifetime_of, purpose_of
from dist_ft.service.http.gate import caller_of, json_body
from dist_ft.service.wire import (
    ApiError,
    Object,
    as_int,
    as_object,
    as_text,
    bad_request,
    new_id,
    refuse_unknown,
)

Body = Annotated[Object, Depends(json_body)]
_NEEDED = ("bytes", "filename", "mime_type", "purpose")


def upload_routes(uploads: Uploads, shelf: Shelf, max_project_bytes: int) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/uploads")

    @router.post("")
    def create(request: Request, body: Body) -> JSONResponse:
        caller = caller_of(request)
        upload = _read_upload(body, caller.project)
        check_room(shelf, caller, upload.bytes, max_project_bytes)
        uploads.create(upload)
        return JSONResponse(uploads.to_wire(upload))

    @router.post("/{upload_id}/parts")
    async def add_part(upload_id: str, request: Request) -> JSONResponse:
        upload = await run_in_threadpool(uploads.pending, upload_id, caller_of(request).project)
        async with form_of(request) as form:
            data = form.get("data")
            if not isinstance(data, UploadFile):
                raise bad_request("'data' is a required property", "data")
            if (data.size or 0) > MAX_PART_BYTES:
                raise ApiError(413, f"The part has {data.size} bytes; the limit is {MAX_PART_BYTES}.", "data")
            part_id = await run_in_threadpool(uploads.add_part, upload, data.file)
        now = int(time.time())
        return JSONResponse({"id": part_id, "object": "upload.part", "created_at": now, "upload_id": upload.id})

    @router.post("/{upload_id}/complete")
    def complete(upload_id: str, request: Request, body: Body) -> JSONResponse:
        upload = uploads.find(upload_id, caller_of(request).project)
        if upload.status != "completed":  # else it is the retry of a request whose answer was lost
            refuse_unknown(body, ("part_ids", "md5"))
            upload = uploads.pending(upload_id, upload.project)
            upload = uploads.complete(upload, body.get("part_ids"), body.get("md5"))
        return JSONResponse(uploads.to_wire(upload))

    @router.post("/{upload_id}/cancel")
    def cancel(upload_id: str, request: Request) -> JSONResponse:
        upload = uploads.pending(upload_id, caller_of(request).project)
        return JSONResponse(uploads.to_wire(uploads.cancel(upload)))

    return router


def _read_upload(body: Object, project: str) -> Upload:
    refuse_unknown(body, (*_NEEDED, "expires_after"))
    for key in _NEEDED:
        if body.get(key) is None:
            raise bad_request(f"Missing required parameter: '{key}'.", key, "missing_required_parameter")
    size = as_int(body["bytes"], "bytes", 1, MAX_UPLOAD_BYTES)
    as_text(body["mime_type"], "mime_type", 200)
    lasts_s = None
    if body.get("expires_after") is not None:
        expires = as_object(body["expires_after"], "expires_after")
        refuse_unknown(expires, ("anchor", "seconds"), "expires_after")
        lasts_s = lifetime_of(expires)
    name = plain_name(as_text(body["filename"], "filename", 1000))
    now = int(time.time())
    return Upload(
        new_id("upload_"), project, size, name, purpose_of(body["purpose"]), now, now + LASTS_S, "pending", lasts_s
    )
