"""Routes of fine-tuning jobs and of models; what is not there answers 501."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import FileResponse, JSONResponse

from dist_ft.service.http.gate import caller_of, json_body, page_limits
from dist_ft.service.index import Index
from dist_ft.service.tuning.fine_tuning import FineTuning, Retry
from dist_ft.service.wire import ApiError, Object, bad_request, page, whole_number

Body = Annotated[Object, Depends(json_body)]
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_NOT_SERVED = (
    "/chat/completions", "/chat/completions/{rest:path}", "/completions", "/responses", "/responses/{rest:path}",
    "/embeddings", "/fine_tuning/alpha/graders/{rest:path}", "/fine_tuning/checkpoints/{rest:path}",
)  # fmt: skip


def job_routes(tuning: FineTuning, index: Index) -> APIRouter:
    """Return the routes of jobs."""
    router = APIRouter(prefix="/fine_tuning/jobs")

    @router.post("")
    def create(request: Request, body: Body) -> JSONResponse:
        count = whole_number(request.headers.get("x-stainless-retry-count", "0"))
        retry = Retry(count or 0, request.headers.get("idempotency-key") or None)
        return JSONResponse(tuning.to_wire(tuning.create(body, caller_of(request), retry)))

    @router.post("/estimate")
    def estimate(request: Request, body: Body) -> JSONResponse:
        found = tuning.estimate(body, caller_of(request)).to_wire()
        return JSONResponse({"object": "dist_ft.estimate", **found})

    @router.get("")
    def listed(request: Request) -> JSONResponse:
        after, limit = page_limits(request, 20, 1000)
        pairs = {
            found.group(1): value
            for key, value in request.query_params.multi_items()
            if (found := _METADATA.fullmatch(key)) is not None
        }
        is_null = request.query_params.get("metadata") == "null"
        jobs, has_more = tuning.page(caller_of(request), after, limit, pairs, is_null)
        return JSONResponse(page([tuning.to_wire(job) for job in jobs], has_more))

    @router.get("/{job}")
    def retrieve(job: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.to_wire(tuning.find(job, caller_of(request))))

    @router.post("/{job}/cancel")
    def cancel(job: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.to_wire(tuning.cancel(job, caller_of(request))))

    @router.post("/{job}/pause")
    def pause(job: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.to_wire(tuning.pause(job, caller_of(request))))

    @router.post("/{job}/resume")
    def resume(job: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.to_wire(tuning.resume(job, caller_of(request))))

    @router.get("/{job}/events")
    def events(job: str, request: Request) -> JSONResponse:
        after, limit = page_limits(request, 20, 1000)
        record = tuning.find(job, caller_of(request))
        return JSONResponse(page(*index.events(record.id, after, limit)))

    @router.get("/{job}/checkpoints")
    def checkpoints(job: str, request: Request) -> JSONResponse:
        after, limit = page_limits(request, 10, 1000)
        record = tuning.find(job, caller_of(request))
        rows, has_more = index.listed("checkpoint", record.project, after, limit, record.id)
        return JSONResponse(page([row.data for row in rows], has_more))

    return router


def model_routes(tuning: FineTuning) -> APIRouter:
    """Return the routes of models. Their names may hold slashes."""
    router = APIRouter()

    @router.get("/models")
    def listed(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": tuning.models(caller_of(request))})

    @router.get("/models/{model:path}")
    def retrieve(model: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.model(model, caller_of(request)))

    @router.delete("/models/{model:path}")
    def delete(model: str, request: Request) -> JSONResponse:
        return JSONResponse(tuning.delete_model(model, caller_of(request)))

    def not_served(request: Request) -> JSONResponse:
        raise ApiError(
            501,
            f"{request.method} {request.url.path[:200]} is not served here.",
            None,
            "not_implemented",
            "server_error",
        )

    for path in _NOT_SERVED:
        router.add_api_route(path, not_served, methods=["GET", "POST", "DELETE"])
    return router


def weights_routes(tuning: FineTuning) -> APIRouter:
    """Return our own routes: the files of a job's weights, one by one."""
    router = APIRouter(prefix="/fine_tuning/jobs")

    @router.get("/{job}/weights")
    def listed(job: str, request: Request) -> JSONResponse:
        folder = tuning.weights(tuning.find(job, caller_of(request)))
        files = [
            {"name": path.name, "bytes": path.stat().st_size} for path in sorted(folder.iterdir()) if path.is_file()
        ]
        return JSONResponse({"object": "list", "data": files})

    @router.get("/{job}/weights/{name}")
    def one(job: str, name: str, request: Request) -> FileResponse:
        folder = tuning.weights(tuning.find(job, caller_of(request)))
        if name not in {path.name for path in folder.iterdir() if path.is_file()}:
            raise bad_request(f"There is no file {name[:100]} among the weights.", "name")
        return FileResponse(folder / name, media_type="application/octet-stream", filename=name)

    return router
