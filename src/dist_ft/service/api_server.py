"""Builds the service from its parts and runs it: the index, the store, the dispatcher, the application."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.responses import JSONResponse, PlainTextResponse

from dist_ft import __version__
from dist_ft.errors import ConfigError, UsageError
from dist_ft.service.api_keys import has_keys, keep_key_of
from dist_ft.service.depot import Depot, open_depot
from dist_ft.service.files.shelf import Shelf
from dist_ft.service.files.uploads import Uploads
from dist_ft.service.http.file_routes import file_routes
from dist_ft.service.http.gate import Answered, Gate, bare_app
from dist_ft.service.http.inference_routes import passed_on
from dist_ft.service.http.job_routes import job_routes, model_routes, weights_routes
from dist_ft.service.http.page_routes import page_routes, report_routes
from dist_ft.service.http.request_quota import RequestQuota
from dist_ft.service.http.upload_routes import upload_routes
from dist_ft.service.http.webhook_routes import webhook_routes
from dist_ft.service.index import Index
from dist_ft.service.inference import OFF, Inference, ServingChoice
from dist_ft.service.tuning.catalogue import DEFAULT, read_catalogue
from dist_ft.service.tuning.dispatcher import Dispatcher, Place
from dist_ft.service.tuning.fine_tuning import FineTuning
from dist_ft.service.tuning.job_store import JobRecord, JobStore
from dist_ft.service.webhooks import Webhooks
from dist_ft.storage.urls import is_loopback, redacted

logger = logging.getLogger(__name__)

_DATABASE = "index.sqlite"
_HEADERS_READ = 2**20  # larger ones get an answer of uvicorn's own; `gate` refuses far smaller ones in the API's form


@dataclass(frozen=True)
class Settings:
    """What `dist-ft serve-api` is told.

    Attributes:
        store: Directory of files and runs, or a URL of them.
        database: URL of the index; None is SQLite in the store.
        catalogue: YAML of base models; None is the embedded one.
        host: Address to listen on.
        port: Port to listen on.
        max_active_jobs: Jobs of a project that are not over at once.
        max_project_bytes: Bytes of a project's files.
        max_requests: Requests of a project a minute; None: as many as it likes.
        serving: Who answers requests for answers.
        admin_key_file: File with an administrator's key; None: keys are made by `dist-ft api key add` alone.
    """

    store: Path | str
    database: str | None = None
    catalogue: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_active_jobs: int = 100
    max_project_bytes: int = 2_500_000_000_000
    max_requests: int | None = None
    serving: ServingChoice = OFF
    admin_key_file: Path | None = None


def open_index(settings: Settings) -> Index:
    """Open the index of a store, and make the store if it is not there.

    Raises:
        UsageError: The store cannot be one, or the database's URL is not understood.
    """
    return Index(settings.database or f"sqlite:///{depot_of(settings).path / _DATABASE}")


def depot_of(settings: Settings) -> Depot:
    """Open a store, and make it if it is not there.

    Raises:
        UsageError: It cannot be one.
    """
    try:
        return open_depot(str(settings.store))
    except (OSError, ConfigError) as error:
        raise UsageError(f"--store {redacted(str(settings.store))}: {error}") from error


def serve(settings: Settings, place: Place) -> None:
    """Serve until SIGINT or SIGTERM. Runs go on.

    Raises:
        UsageError: The address is open to others and there is no key, or the file of a key holds none.
    """
    index = open_index(settings)
    if settings.admin_key_file is not None:
        keep_key_of(index, settings.admin_key_file)
    if not has_keys(index) and not is_loopback(settings.host):
        raise UsageError(
            f"--host {settings.host} is open to others, and the service has no key; make one first: dist-ft api key "
            f"add --store {settings.store} --role admin, or give --admin-key-file"
        )
    config = uvicorn_config(build_app(settings, index, place), settings.host, settings.port)
    logger.info("serving %s on http://%s:%d", settings.store, settings.host, settings.port)
    try:
        uvicorn.Server(config).run()
    finally:
        index.close()


def uvicorn_config(app: Gate, host: str, port: int) -> uvicorn.Config:
    """Return how the application is served."""
    return uvicorn.Config(
        app, host=host, port=port, http="h11", h11_max_incomplete_event_size=_HEADERS_READ, access_log=False,
        log_level="warning", timeout_keep_alive=75, timeout_graceful_shutdown=10, server_header=False,
    )  # fmt: skip


def build_app(settings: Settings, index: Index, place: Place) -> Gate:
    """Return the application behind its gate; a new index is filled from the store."""
    depot = depot_of(settings)
    webhooks = Webhooks(index)

    def on_end(record: JobRecord) -> None:
        webhooks.announce(record.project, f"fine_tuning.job.{record.status}", record.id)

    jobs, shelf = JobStore(depot, index, on_end), Shelf(depot, index)
    uploads = Uploads(depot, index, shelf)
    if index.is_empty():
        shelf.relist()
        uploads.relist()
        jobs.relist()
        if not index.is_empty():
            logger.warning("the index is made anew from %s; keys and webhooks have to be made anew, too", depot.address)
    catalogue = read_catalogue(settings.catalogue or DEFAULT)
    dispatcher = Dispatcher(index, jobs, shelf, catalogue, place)
    tuning = FineTuning(index, jobs, shelf, catalogue, settings.max_active_jobs)
    answered = Answered({})
    inference = Inference(depot, settings.serving)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        dispatcher.start()
        webhooks.start()
        yield
        await inference.close()
        dispatcher.close()
        webhooks.close()

    app = bare_app(life)
    if not inference.is_off:
        app.include_router(passed_on(inference), prefix="/v1")
    for router in (
        file_routes(shelf, settings.max_project_bytes),
        upload_routes(uploads, shelf, settings.max_project_bytes),
        weights_routes(tuning),
        report_routes(tuning),
        job_routes(tuning, index),
        model_routes(tuning),
        webhook_routes(webhooks),
    ):
        app.include_router(router, prefix="/v1")
    app.include_router(page_routes())
    _add_status(app, index, answered)
    return Gate(app, index, answered, RequestQuota(settings.max_requests))


def _add_status(app: FastAPI, index: Index, answered: Answered) -> None:
    @app.get("/health")
    def health() -> JSONResponse:
        index.counts("job")
        return JSONResponse({"status": "ok", "version": __version__})

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        lines = ["# TYPE dist_ft_jobs gauge"]
        lines += [f'dist_ft_jobs{{status="{status}"}} {count}' for status, count in sorted(index.counts("job").items())]
        lines.append("# TYPE dist_ft_http_requests_total counter")
        lines += [f'dist_ft_http_requests_total{{status="{s}"}} {n}' for s, n in sorted(answered.by_status.items())]
        lines += ["# TYPE dist_ft_http_seconds_total counter", f"dist_ft_http_seconds_total {answered.seconds:.6f}"]
        return PlainTextResponse("\n".join(lines) + "\n")
