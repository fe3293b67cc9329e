"""Serves on Ray Serve: an ingress with the routes, and replicas that keep engines. None of them imports torch."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from dist_ft.engine.protocol import Ask, Event, Refused
from dist_ft.errors import UsageError
from dist_ft.machine import has_gpu
from dist_ft.orchestrate.workers.processes import ForkServer
from dist_ft.service import DATABASE_ENV
from dist_ft.service.api_keys import has_keys
from dist_ft.service.api_server import Settings, depot_of, open_index
from dist_ft.service.files.shelf import Shelf
from dist_ft.service.http.gate import Gate
from dist_ft.service.index import Index
from dist_ft.service.tuning.catalogue import DEFAULT, read_catalogue
from dist_ft.service.tuning.fine_tuning import FineTuning
from dist_ft.service.tuning.job_store import JobStore
from dist_ft.serving.backend import Names, ServedName
from dist_ft.serving.engine_client import Engines
from dist_ft.serving.routes import build_app
from dist_ft.serving.served_models import DirectoryNames, Exports, RunNames, StoreNames
from dist_ft.storage.urls import is_loopback, is_url

APP = "dist-ft"
_REQUESTS_OF_REPLICA = 128
_QUEUED = 256
_SPINS = "2000"
"""Turns of a few nanoseconds, after which a thread sleeps until it is woken."""
_LOST = "The replica was lost while it answered; send the request again."


@dataclass(frozen=True)
class Source:
    """What is served; one of the first two is given.

    Attributes:
        target: Path or URL of a run, path of a model or an adapter.
        store: Store of a service, a path or URL.
        database: URL of its index.
        catalogue: YAML of its base models.
    """

    target: str | None = None
    store: str | None = None
    database: str | None = None
    catalogue: Path | None = None


@dataclass(frozen=True)
class Place:
    """Where it is served.

    Attributes:
        host: Address to listen on.
        port: Port to listen on.
        replicas: How many; None lets Ray Serve decide, by the number of requests.
        address: A Ray cluster; None starts Ray here.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int | None = 1
    address: str | None = None


class Starter:
    """A fork server that begins when it is first needed."""

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._lock = threading.Lock()

    def __call__(self) -> str:
        """Return its socket."""
        with self._lock:
            self._server = self._server or ForkServer(has_gpu())
            if not self._server.is_alive:
                self._server.restart()
            return self._server.socket_path


def names_of(source: Source, scratch: Path) -> tuple[Names, Index]:
    """Return the names of what is served, and the index with its keys.

    Args:
        source: What is served.
        scratch: Where exports are put, if there is no store.

    Raises:
        DistFtError: It cannot be served.
    """
    starter = Starter()
    if source.store is not None:
        settings = Settings(source.store, source.database, source.catalogue)
        index, depot = open_index(settings), depot_of(settings)
        jobs, catalogue = JobStore(depot, index, lambda _: None), read_catalogue(source.catalogue or DEFAULT)
        tuning = FineTuning(index, jobs, Shelf(depot, index), catalogue, 0)
        return StoreNames(tuning, catalogue, Exports(depot.path / "serving", starter)), index
    assert source.target is not None
    index = Index(f"sqlite:///{scratch / 'keys.sqlite'}")  # no key: it answers on loopback only
    path = Path(source.target)
    is_plain = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_plain:
        return DirectoryNames(path.absolute()), index
    return RunNames(source.target, Exports(scratch, starter)), index


class RayBackend:
    """Lets replicas answer.

    Args:
        replicas: Their handle.
    """

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True)

    async def answer(self, model: ServedName, ask: Ask) -> AsyncIterator[Event]:
        """See `Backend`."""
        events = self._replicas.answer.remote(model, ask)
        is_whole = False
        try:
            async for event in events:
                yield event
            is_whole = True
        except BackPressureError:
            yield Refused(ask.id, 429, "All replicas are busy; try again later.", None, "engine_overloaded")
        except (RayError, RayServeException):
            yield Refused(ask.id, 503, _LOST, None, "replica_lost")
        finally:
            if not is_whole:
                events.cancel()


class Replica:
    """Keeps engines: one a base model, two at most."""

    def __init__(self) -> None:
        # Threads that wait for one another spin for long by default. Where other processes want the cores, that made an
        # answer seven times as slow as with one thread.
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
        self._engines = Engines(ForkServer(has_gpu()), most=2)

    async def answer(self, model: ServedName, ask: Ask) -> AsyncIterator[Event]:
        """See `Backend`."""
        async for event in self._engines.answer(model, ask):
            yield event

    def process_id(self) -> int:
        """Return the process id of the replica."""
        return os.getpid()


@serve.ingress()
class Ingress:
    """The routes, keys and names.

    Args:
        source: What is served.
        replicas: Handle of those who answer.
    """

    def __init__(self, source: Source, replicas: DeploymentHandle) -> None:
        self._source, self._replicas = source, replicas

    def __serve_build_asgi_app__(self) -> Gate:
        names, index = names_of(self._source, Path(tempfile.mkdtemp(prefix="dist-ft-serve-")))
        return build_app(names, RayBackend(self._replicas), index)


def application(source: Source, place: Place) -> serve.Application:
    """Return the application."""
    scaling: dict[str, Any] = {"num_replicas": place.replicas}
    if place.replicas is None:
        scaling = {"autoscaling_config": {"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 12}}
    replicas = serve.deployment(Replica).options(
        name="Replica",
        max_ongoing_requests=_REQUESTS_OF_REPLICA,
        max_queued_requests=_QUEUED,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(has_gpu())},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        **scaling,
    )
    ingress = serve.deployment(Ingress).options(
        name="Ingress", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=5
    )
    return ingress.bind(source, replicas.bind())


def from_config(arguments: dict[str, str]) -> serve.Application:
    """Return the application that `import_path` of a Serve config names, as a RayService starts it.

    Args:
        arguments: `args` of the config: `store`, and perhaps `catalogue` and `replicas`, a number or `auto`. The URL of
            the index comes from the environment, because it holds a password.

    Raises:
        DistFtError: There is no such store, or it has no key.
    """
    catalogue, replicas = arguments.get("catalogue"), arguments.get("replicas", "1")
    source = Source(
        store=arguments["store"],
        database=os.environ.get(DATABASE_ENV),
        catalogue=Path(catalogue) if catalogue else None,
    )
    place = Place(host="0.0.0.0", replicas=None if replicas == "auto" else int(replicas))
    check(source, place)
    return application(source, place)


def check(source: Source, place: Place) -> None:
    """Check what can be checked before Ray starts.

    Raises:
        DistFtError: Nothing is there to be served, or it would be open to others without a key.
    """
    if source.store is not None and not is_url(source.store) and not Path(source.store).is_dir():
        raise UsageError(f"--store {source.store} is not there; `dist-ft serve-api --store` makes one")
    if source.store is None and "://" not in str(source.target) and not Path(str(source.target)).is_dir():
        raise UsageError(f"{source.target} is not there; give a run, or a directory of a model or an adapter")
    if is_loopback(place.host):
        return
    if source.store is None:
        raise UsageError(f"--host {place.host} is open to others, and only a --store has keys")
    index = open_index(Settings(source.store, source.database))
    try:
        if not has_keys(index):
            raise UsageError(
                f"--host {place.host} is open to others, and the store has no key; make one first: dist-ft api key "
                f"add --store {source.store}"
            )
    finally:
        index.close()


def start(source: Source, place: Place) -> None:
    """Serve, and return when requests are answered; Ray has to be connected.

    Raises:
        DistFtError: It cannot be served.
    """
    serve.start(http_options={"host": place.host, "port": place.port, "request_timeout_s": None})
    serve.run(application(source, place), name=APP, route_prefix="/")


def stop() -> None:
    """End what was served, and the connection to Ray."""
    serve.delete(APP)
    ray.shutdown()
