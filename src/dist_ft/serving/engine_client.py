"""The client's side of engines: starts them, asks them, starts others when they die. No torch, no ray."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Any

from dist_ft import errors
from dist_ft.engine.protocol import EVENTS, Ask, EngineSpec, Event, Piece, Refused
from dist_ft.errors import DistFtError, WorkerCrashError
from dist_ft.orchestrate.workers.processes import Child, ForkServer, describe_exit, last_words
from dist_ft.service.wire import new_id
from dist_ft.serving.backend import ServedName
from dist_ft.typed_json import from_json

logger = logging.getLogger(__name__)

_NO_ENGINE = "The engine was lost while it answered; send the request again."


class EngineClient:
    """One engine process, and those who wait for it.

    Args:
        socket_path: A fork server.
        spec: What the engine is made of.
    """

    def __init__(self, socket_path: str, spec: EngineSpec) -> None:
        self._loop = asyncio.get_running_loop()
        self._spec, self._socket_path = spec, socket_path
        self._waiting: dict[str, asyncio.Queue[Event]] = {}
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._child: Child | None = None
        self.pid = 0
        """Process id, once it is ready."""
        self.is_lost = False
        """Whether the engine is gone."""
        threading.Thread(target=self._follow, name="engine", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return not self._waiting

    async def answer(self, ask: Ask) -> AsyncIterator[Event]:
        """Yield the events of a request; closing the iterator cancels it.

        Raises:
            DistFtError: The engine does not start.
        """
        ask = replace(ask, id=new_id("", 16))  # names of clients need not differ
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._waiting[ask.id] = events
        unfinished = set(range(ask.sampling.n))
        try:
            await asyncio.shield(self._ready)
            self._tell({"ask": asdict(ask)})
            while unfinished:
                event = await events.get()
                if isinstance(event, Piece) and event.finish is not None:
                    unfinished.discard(event.choice)
                yield event
                if isinstance(event, Refused):
                    break
        finally:
            del self._waiting[ask.id]
            if unfinished and self._ready.done():
                self._tell({"cancel": ask.id})

    def close(self) -> None:
        """End the engine."""
        if self._child is not None:
            self._child.close()

    def _tell(self, message: dict[str, Any]) -> None:
        if self._child is not None and not self.is_lost:
            self._child.tell(message)

    def _follow(self) -> None:
        """Start the engine and read what it says, in a thread, so that it never waits for a reader."""
        error: DistFtError | None = None
        try:
            child = self._child = Child(self._socket_path, self._spec)
            while not child.is_closed:
                for message in child.receive(1.0):
                    if "error" in message:
                        error = errors.from_dict(message["error"])
                    else:
                        self._loop.call_soon_threadsafe(self._take, message)
            exit_text = describe_exit(child.exit_status)
            error = error or WorkerCrashError(f"the engine died ({exit_text}){last_words(self._socket_path)}")
        except DistFtError as failed:
            error = failed
        except (OSError, ValueError) as failed:  # its connection was closed here
            error = WorkerCrashError(f"the engine was closed ({failed})")
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._lose, error)

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.pid = message["ready"]
            self._ready.set_result(None)
            return
        event: Event = from_json(EVENTS[message.pop("event")], message)
        if (queue := self._waiting.get(event.id)) is not None:
            queue.put_nowait(event)

    def _lose(self, error: DistFtError) -> None:
        logger.warning("engine lost: %s", error)
        self.is_lost = True
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # seen: nobody may wait
        for ask_id, queue in self._waiting.items():
            queue.put_nowait(Refused(ask_id, 503, _NO_ENGINE, None, "engine_lost"))


class Engines:
    """The engines of a replica, one a base model. The one used longest ago ends when another needs its place.

    Args:
        server: A fork server of this machine.
        most: Engines at once.
    """

    def __init__(self, server: ForkServer, most: int = 1) -> None:
        self._server, self._most = server, most
        self._engines: OrderedDict[str, EngineClient] = OrderedDict()

    async def answer(self, model: ServedName, ask: Ask) -> AsyncIterator[Event]:
        """See `Backend`."""
        engine = self._engine_of(model.spec)
        if engine is None:
            message = "All engines are busy with other models; try again later."
            yield Refused(ask.id, 429, message, None, "engine_overloaded")
            return
        try:
            async for event in engine.answer(ask):
                yield event
        except DistFtError as error:
            yield Refused(ask.id, 503, f"The model does not load: {error}", "model", "model_not_loaded")

    @property
    def pids(self) -> list[int]:
        """Process ids of the engines that are ready."""
        return [engine.pid for engine in self._engines.values() if engine.pid and not engine.is_lost]

    def close(self) -> None:
        """End all engines."""
        for engine in self._engines.values():
            engine.close()

    def _engine_of(self, spec: EngineSpec) -> EngineClient | None:
        key = json.dumps(asdict(spec), sort_keys=True)
        self._engines = OrderedDict((k, engine) for k, engine in self._engines.items() if not engine.is_lost)
        if key not in self._engines:
            if len(self._engines) >= self._most:
                oldest = next((k for k, engine in self._engines.items() if engine.is_idle), None)
                if oldest is None:
                    return None
                self._engines.pop(oldest).close()
            if not self._server.is_alive:
                self._server.restart()
            self._engines[key] = EngineClient(self._server.socket_path, spec)
        self._engines.move_to_end(key)
        return self._engines[key]
