"""Routes of the page at `/`: its three files, and the report of a run, which the page shows."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse

from dist_ft.errors import UserError
from dist_ft.report.run_page import read_run_page
from dist_ft.run.place import open_run
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
    """Return our own route: the report of a job's run, as `dist-ft report` makes it."""
    router = APIRouter(prefix="/fine_tuning/jobs")

    @router.get("/{job}/report")
    def report(job: str, request: Request) -> HTMLResponse:
        record = tuning.find(job, caller_of(request))
        try:
            return HTMLResponse(read_run_page(open_run(str(tuning.run_dir(record)))))
        except UserError as error:
            raise ApiError(404, f"Job {record.id} has no report; its run has not begun.") from error

    return router
