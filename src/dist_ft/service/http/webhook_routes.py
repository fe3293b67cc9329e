"""Routes of webhook endpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse

from dist_ft.service.http.gate import caller_of, json_body, page_limits
from dist_ft.service.webhooks import EVENT_TYPES, Webhooks
from dist_ft.service.wire import Object, bad_request, page, refuse_unknown

Body = Annotated[Object, Depends(json_body)]
_MEMBERS = ("name", "url", "event_types")


def webhook_routes(webhooks: Webhooks) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.get("/webhook_event_types")
    def event_types() -> JSONResponse:
        return JSONResponse({"object": "list", "data": list(EVENT_TYPES)})

    @router.post("/webhook_endpoints")
    def create(request: Request, body: Body) -> JSONResponse:
        refuse_unknown(body, _MEMBERS)
        return JSONResponse(webhooks.create(body, caller_of(request).project).to_wire(with_secret=True))

    @router.get("/webhook_endpoints")
    def listed(request: Request) -> JSONResponse:
        after, limit = page_limits(request, 20, 100)
        found, has_more = webhooks.page(caller_of(request).project, after, limit)
        return JSONResponse(page([endpoint.to_wire() for endpoint in found], has_more))

    @router.get("/webhook_endpoints/{endpoint}")
    def retrieve(endpoint: str, request: Request) -> JSONResponse:
        return JSONResponse(webhooks.find(endpoint, caller_of(request).project).to_wire())

    @router.post("/webhook_endpoints/{endpoint}")
    def update(endpoint: str, request: Request, body: Body) -> JSONResponse:
        found = webhooks.find(endpoint, caller_of(request).project)
        refuse_unknown(body, _MEMBERS)
        return JSONResponse(webhooks.update(found, body).to_wire())

    @router.delete("/webhook_endpoints/{endpoint}")
    def delete(endpoint: str, request: Request) -> JSONResponse:
        found = webhooks.find(endpoint, caller_of(request).project)
        webhooks.delete(found)
        return JSONResponse({"id": found.id, "object": "webhook_endpoint.deleted", "deleted": True})

    @router.post("/webhook_endpoints/{endpoint}/rotate_secret")
    def rotate(endpoint: str, request: Request, body: Body) -> JSONResponse:
        found = webhooks.find(endpoint, caller_of(request).project)
        refuse_unknown(body, ("keep_old_secret_active_for_24_hours",))
        keep = body.get("keep_old_secret_active_for_24_hours")
        if keep is not None and not isinstance(keep, bool):
            name = "keep_old_secret_active_for_24_hours"
            raise bad_request(f"Invalid type for '{name}': expected a boolean.", name)
        return JSONResponse(webhooks.rotate(found, bool(keep)).to_wire(with_secret=True))

    @router.post("/webhook_endpoints/{endpoint}/test")
    def test(endpoint: str, request: Request, body: Body) -> JSONResponse:
        found = webhooks.find(endpoint, caller_of(request).project)
        refuse_unknown(body, ("event_type",))
        status = webhooks.test(found, body.get("event_type"))
        return JSONResponse(
            {
                "object": "webhook_endpoint.test", "webhook_endpoint_id": found.id, "event_type": body["event_type"],
                "status_code": status, "success": True,
            }
        )  # fmt: skip

    return router
