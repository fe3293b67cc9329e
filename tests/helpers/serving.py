"""The inference API in this process, over real engine processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dist_ft.engine.protocol import Ask, Event
from dist_ft.orchestrate.workers.processes import ForkServer
from dist_ft.service.api_keys import Caller
from dist_ft.service.index import Index
from dist_ft.service.wire import Object
from dist_ft.serving.backend import ServedName, no_model
from dist_ft.serving.engine_client import Engines
from dist_ft.serving.routes import build_app
from tests.helpers.api_server import in_thread


@dataclass
class FixedNames:
    """Models by name, for everybody."""

    models: Mapping[str, ServedName]

    def listed(self, caller: Caller) -> list[Object]:
        return [model.to_wire() for model in self.models.values()]

    def find(self, name: str, caller: Caller) -> ServedName:
        if name not in self.models:
            raise no_model(name)
        return self.models[name]


class LateEngines:
    """Engines that begin with the server's loop."""

    def __init__(self, server: ForkServer) -> None:
        self._server = server
        self.engines: Engines | None = None

    async def answer(self, model: ServedName, ask: Ask) -> AsyncIterator[Event]:
        self.engines = self.engines or Engines(self._server)
        async for event in self.engines.answer(model, ask):
            yield event


@dataclass
class InferenceServer:
    """A server that answers: its URL, who answers, its keys."""

    url: str
    backend: LateEngines
    index: Index


@contextmanager
def inference_server(models: Mapping[str, ServedName], place: Path) -> Iterator[InferenceServer]:
    """Serves models until the block ends."""
    index = Index(f"sqlite:///{place / 'keys.sqlite'}")
    starter = ForkServer()
    backend = LateEngines(starter)
    try:
        with in_thread(build_app(FixedNames(models), backend, index)) as url:
            yield InferenceServer(f"{url}/v1", backend, index)
    finally:
        if backend.engines is not None:
            backend.engines.close()
        starter.close()
        index.close()
