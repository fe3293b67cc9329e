"""Everything that a request passes before its route: ids, limits, authentication; and the form of every error."""

from __future__ import annotations

import json
import logging
import time
import uuid
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from dist_ft import __version__
from dist_ft.service.api_keys import ANYBODY, Caller, caller_with, has_keys, hidden
from dist_ft.service.http.request_quota import RequestQuota, Taken
from dist_ft.service.index import Index
from dist_ft.service.wire import ApiError, Json, Object, bad_request, whole_number
from dist_ft.storage.urls import is_loopback

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 2**20
MAX_BODY_BYTES = 513 * 2**20
"""A file of 512 MB and the frame around it."""
MAX_HEADER_BYTES = 2**16
_JSON = "application/json"
_MISSING = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


@dataclass
class Answered:
    """Counts of answers, for /metrics."""

    by_status: dict[int, int]
    seconds: float = 0.0


class Gate:
    """Wraps the application.

    Args:
        app: The application.
        index: Where the keys are.
        answered: Counts of answers.
        quota: Counts requests a project.
    """

    def __init__(self, app: ASGIApp, index: Index, answered: Answered, quota: RequestQuota) -> None:
        self._app, self._index, self._answered, self._quota = app, index, answered, quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        sent = _Sent(send, began)
        try:
            _check_head(scope, headers)
            _check_origin(headers)
            if scope["path"].startswith("/v1"):
                caller = await run_in_threadpool(self._caller_of, headers)
                scope.setdefault("state", {})["caller"] = caller
                sent.organization = caller.organization
                sent.taken = self._quota.take(caller.project)
            await self._app(scope, _Limited(receive), sent)
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("%s %s failed", scope["method"], scope["path"])
            if sent.status is None:
                await error_response(error)(scope, receive, sent)
        finally:
            status = sent.status or 499
            self._answered.by_status[status] = self._answered.by_status.get(status, 0) + 1
            self._answered.seconds += time.perf_counter() - began

    def _caller_of(self, headers: dict[str, str]) -> Caller:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        key = key.strip()
        if not has_keys(self._index):
            _check_host(headers)
            return ANYBODY
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, _MISSING)
        caller = caller_with(self._index, key)
        if caller is None:
            raise ApiError(401, f"Incorrect API key provided: {hidden(key)}.", None, "invalid_api_key")
        project = headers.get("openai-project")
        if project is not None and project != caller.project:
            raise ApiError(401, f"The key has no right to the project {project[:80]}.", None, "invalid_project")
        organization = headers.get("openai-organization")
        if organization is not None and organization != caller.organization:
            raise ApiError(401, f"The key has no right to {organization[:80]}.", None, "invalid_organization")
        return caller


class _Sent:
    """Sends an answer with the headers that every answer has, and remembers its status."""

    def __init__(self, send: Send, began: float) -> None:
        self._send, self._began = send, began
        self.status: int | None = None
        self.organization: str | None = None
        self.taken: Taken | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            spent = int((time.perf_counter() - self._began) * 1000)
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", f"req_{uuid.uuid4().hex}".encode()),
                (b"openai-processing-ms", str(spent).encode()),
                (b"openai-version", b"2020-10-01"),
                (b"x-content-type-options", b"nosniff"),
                *([(b"openai-organization", self.organization.encode())] if self.organization else []),
                *(self.taken.headers() if self.taken else []),
            ]
        await self._send(message)


class _Limited:
    """Receives a body, and ends one that is too large."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._seen = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
        return message


def error_response(error: Exception) -> JSONResponse:
    """Return the answer for an error; one that is not ours says nothing of its cause."""
    if not isinstance(error, ApiError):
        error = ApiError(500, "The server had an error while processing your request.", kind="server_error")
    return JSONResponse(error.body(), error.status, headers=error.headers)


def bare_app(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """Return an application without routes and without FastAPI's own pages, whose errors have the API's form."""
    app = FastAPI(
        title="dist-ft", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
        lifespan=lifespan,
    )  # fmt: skip
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_any_error)
    return app


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer for what Starlette refuses: unknown paths and methods, broken forms."""
    assert isinstance(error, HTTPException)
    line = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        return error_response(ApiError(404, f"Invalid URL ({line})"))
    if error.status_code == 405:
        return error_response(ApiError(405, f"Not allowed to {request.method} on {request.url.path[:200]}."))
    return error_response(ApiError(error.status_code, str(error.detail)))


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    """Answer for our own errors."""
    return error_response(error)


async def _on_any_error(_: Request, error: Exception) -> JSONResponse:
    """Answer for a fault of our own, which Starlette would tell as plain text. The gate writes it to the log."""
    return error_response(error)


def caller_of(request: Request) -> Caller:
    """Return who sent a request."""
    caller: Caller = request.state.caller
    return caller


async def json_body(request: Request) -> Object:
    """Return the JSON object of a body; an empty body is an empty object.

    Raises:
        ApiError: It is something else, or too large, or said to be of another type.
    """
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_JSON_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_JSON_BYTES} bytes.")
        chunks.append(chunk)
    raw = b"".join(chunks)
    if not raw.strip():
        return {}
    kind = request.headers.get("content-type", _JSON)
    if kind.partition(";")[0].strip().lower() != _JSON:
        raise bad_request(
            f"Unsupported content type: '{kind[:80]}'. This API method only accepts '{_JSON}' requests.",
            code="unsupported_content_type",
        )
    try:
        value: Json = json.loads(raw, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can be neither stored nor sent back
    except (ValueError, RecursionError) as error:
        raise bad_request(
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP "
            "library correctly. The API expects a JSON payload.)"
        ) from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _check_head(scope: Scope, headers: dict[str, str]) -> None:
    size = sum(len(key) + len(value) for key, value in scope["headers"])
    if size > MAX_HEADER_BYTES or len(scope["query_string"]) > MAX_HEADER_BYTES:
        raise ApiError(431, f"The headers are larger than {MAX_HEADER_BYTES} bytes.")
    if headers.get("content-encoding", "identity") != "identity":
        raise ApiError(
            415, f"Content-Encoding {headers['content-encoding'][:40]} is not taken; send the body as it is."
        )
    length = whole_number(headers.get("content-length", "0"))
    if length is None or length > MAX_BODY_BYTES:
        raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
    if "\x00" in unquote(scope["path"]):
        raise ApiError(404, "Invalid URL")
    if b"%00" in scope["query_string"]:
        raise bad_request("The query holds a null character.")


def _check_origin(headers: dict[str, str]) -> None:
    """Refuse what a browser sends for a page of another site; clients that are no browsers send no Origin."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise ApiError(403, f"A page of {origin[:100]} may not use this service.")


def _check_host(headers: dict[str, str]) -> None:
    """Refuse other names of this machine while no key is asked for: another site's name may lead here."""
    host = headers.get("host", "")
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if not is_loopback(name.strip("[]")):
        raise ApiError(403, f"Host {host[:100]} is answered with a key only; ask for 127.0.0.1, or make a key.")


def page_limits(request: Request, default: int, most: int) -> tuple[str | None, int]:
    """Return `after` and `limit` of a query.

    Raises:
        ApiError: The limit is out of range.
    """
    given = request.query_params.get("limit")
    limit = whole_number(given) if given else default
    if limit is None or not 1 <= limit <= most:
        raise bad_request(
            f"Invalid value for 'limit': {(given or '')[:40]}, expected an integer from 1 to {most}.", "limit"
        )
    return request.query_params.get("after") or None, limit
