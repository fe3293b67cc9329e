"""Routes of the page at `/`: its three files, and the report that a run writes, which the page shows."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse

from dist_ft.service.http.gate import caller_of
from dist_ft.service.tuning.fine_tuning import FineTuning
from dist_ft.service.wire import ApiError

_WEB = Path(__file__).parent.parent / "web"
_HEADERS = {
    # The report brings its style along, and no script; charts and icons are in the documents themselves.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src data:; "
        "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> APIRouter:
    """Return the routes of the page's files. They say nothing of any project, so they need no key."""
    router = APIRouter()

    @router.get("/")
    def index() -> FileResponse:
        return FileResponse(_WEB / "index.html", headers=_HEADERS)

    @router.get("/page.css")
    def style() -> FileResponse:
        return FileResponse(_WEB / "page.css", headers=_HEADERS)

    @router.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(_WEB / "page.js", media_type="text/javascript", headers=_HEADERS)

    return router


def report_routes(tuning: FineTuning) -> APIRouter:
    """Return our own route: the report of a job's run, which the run itself keeps up to date."""
    router = APIRouter(prefix="/fine_tuning/jobs")

    @router.get("/{job}/report")
    def report(job: str, request: Request) -> FileResponse:
        record = tuning.find(job, caller_of(request))
        run = tuning.run(record)
        run.fetch(run.report.name)
        if not run.report.is_file():
            raise ApiError(404, f"Job {record.id} has no report yet; its run has not begun.")
        return FileResponse(run.report, media_type="text/html")

    return router
