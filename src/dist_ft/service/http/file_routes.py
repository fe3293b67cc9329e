"""Routes of files."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, JSONResponse, Response

from dist_ft.service.api_keys import Caller
from dist_ft.service.files.shelf import MAX_FILE_BYTES, Shelf, StoredFile, plain_name
from dist_ft.service.http.forms import check_room, form_of, lifetime_of, purpose_of
from dist_ft.service.http.gate import caller_of, page_limits
from dist_ft.service.wire import ApiError, bad_request, page


def file_routes(shelf: Shelf, max_project_bytes: int) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    def found(file_id: str, caller: Caller) -> StoredFile:
        stored = shelf.find(file_id, caller.project)
        if stored is None:
            raise ApiError(404, f"No such File object: {file_id[:100]}", "id")
        return stored

    @router.post("/files")
    async def create(request: Request) -> JSONResponse:
        caller = caller_of(request)
        async with form_of(request) as form:
            upload, purpose = form.get("file"), form.get("purpose")
            if not isinstance(upload, UploadFile):
                raise bad_request("'file' is a required property", "file")
            name = plain_name(upload.filename or "")
            purpose = purpose_of(None if isinstance(purpose, UploadFile) else purpose)
            expires = {key: form.get(f"expires_after[{key}]") for key in ("anchor", "seconds")}
            lasts_s = None if expires == {"anchor": None, "seconds": None} else lifetime_of(expires)
            size = upload.size or 0
            if size > MAX_FILE_BYTES:
                raise ApiError(413, f"The file has {size} bytes; the limit is {MAX_FILE_BYTES}.", "file")
            await run_in_threadpool(check_room, shelf, caller, size, max_project_bytes)
            stored = await run_in_threadpool(shelf.add, upload.file, name, purpose, caller.project, lasts_s)
        return JSONResponse(stored.to_wire())

    @router.get("/files")
    def listed(request: Request) -> JSONResponse:
        after, limit = page_limits(request, 10_000, 10_000)
        order = request.query_params.get("order") or "desc"
        if order not in ("asc", "desc"):
            raise bad_request(f"Invalid value for 'order': {order[:40]}, expected 'asc' or 'desc'.", "order")
        purpose = request.query_params.get("purpose") or None
        files, has_more = shelf.page(caller_of(request).project, after, limit, purpose, order == "asc")
        return JSONResponse(page([stored.to_wire() for stored in files], has_more))

    @router.get("/files/{file_id}")
    def retrieve(file_id: str, request: Request) -> JSONResponse:
        return JSONResponse(found(file_id, caller_of(request)).to_wire())

    @router.delete("/files/{file_id}")
    def delete(file_id: str, request: Request) -> JSONResponse:
        stored = found(file_id, caller_of(request))
        shelf.delete(stored)
        return JSONResponse({"id": stored.id, "object": "file", "deleted": True})

    @router.get("/files/{file_id}/content")
    def content(file_id: str, request: Request) -> Response:
        stored = found(file_id, caller_of(request))
        return FileResponse(shelf.content(stored.id), media_type="application/octet-stream", filename=stored.filename)

    return router
