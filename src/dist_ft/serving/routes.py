"""The routes of OpenAI's inference API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from dist_ft import __version__
from dist_ft.service.http.gate import Answered, Gate, bare_app, caller_of, json_body
from dist_ft.service.http.request_quota import RequestQuota
from dist_ft.service.index import Index
from dist_ft.service.wire import Object
from dist_ft.serving.asked import Asked
from dist_ft.serving.backend import Backend, Names
from dist_ft.serving.chat_api import chat_answer, chat_stream, read_chat
from dist_ft.serving.completions_api import completions_answer, completions_stream, echo_of, read_completions
from dist_ft.serving.gathered import Begun, begin
from dist_ft.serving.responses_api import read_response, response_answer, response_stream

Body = Annotated[Object, Depends(json_body)]
T = TypeVar("T")


def build_app(names: Names, backend: Backend, index: Index) -> Gate:
    """Return the application behind its gate."""
    app = bare_app()
    app.include_router(inference_routes(names, backend), prefix="/v1")

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok", "version": __version__})

    return Gate(app, index, Answered({}), RequestQuota(None))


def inference_routes(names: Names, backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    async def begun(asked: Asked, request: Request) -> Begun:
        # Names may lie in a database.
        model = await run_in_threadpool(names.find, asked.model, caller_of(request))
        return await begin(backend.answer(model, replace(asked.ask, adapter=model.adapter)))

    @router.get("/models")
    def listed(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": names.listed(caller_of(request))})

    @router.get("/models/{model:path}")
    def retrieve(model: str, request: Request) -> JSONResponse:
        return JSONResponse(names.find(model, caller_of(request)).to_wire())

    @router.post("/chat/completions")
    async def chat(request: Request, body: Body) -> Response:
        asked = read_chat(body)
        if asked.is_streamed:
            return _stream(chat_stream(asked, await begun(asked, request)))
        return await _whole(request, lambda: _then(begun(asked, request), lambda b: chat_answer(asked, b)))

    @router.post("/completions")
    async def completions(request: Request, body: Body) -> Response:
        every = read_completions(body)
        echoes = [echo_of(body, asked) for asked in every]

        async def all_begun() -> list[Begun]:
            return list(await asyncio.gather(*(begun(asked, request) for asked in every)))

        if every[0].is_streamed:
            return _stream(completions_stream(every, await all_begun(), echoes))
        return await _whole(request, lambda: _then(all_begun(), lambda b: completions_answer(every, b, echoes)))

    @router.post("/responses")
    async def responses(request: Request, body: Body) -> Response:
        asked = read_response(body)
        if asked.is_streamed:
            return _stream(response_stream(asked, await begun(asked, request), body))
        return await _whole(request, lambda: _then(begun(asked, request), lambda b: response_answer(asked, b, body)))

    return router


async def _then(first: Awaitable[T], second: Callable[[T], Awaitable[Object]]) -> Object:
    return await second(await first)


def _stream(lines: AsyncIterator[bytes]) -> StreamingResponse:
    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _whole(request: Request, answer: Callable[[], Awaitable[Object]]) -> Response:
    """Return a whole answer; a client that goes takes its request along."""
    work = asyncio.ensure_future(answer())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return JSONResponse(work.result())
    finally:
        for task in (work, gone):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
