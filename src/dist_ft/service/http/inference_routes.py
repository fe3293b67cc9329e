"""Routes of inference, which are passed on."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import StreamingResponse

from dist_ft.service.http.gate import json_body
from dist_ft.service.inference import Inference
from dist_ft.service.wire import Object

Body = Annotated[Object, Depends(json_body)]


def passed_on(inference: Inference) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    async def answer(request: Request, body: Body) -> StreamingResponse:
        found = await inference.pass_on(request.url.path, request.headers, json.dumps(body).encode())
        return StreamingResponse(found.body, found.status, headers=found.headers)

    for path in ("/chat/completions", "/completions", "/responses"):
        router.add_api_route(path, answer, methods=["POST"])
    return router
