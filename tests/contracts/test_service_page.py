"""What the page of the service is made of: its files, the report of a run, and that other sites cannot use either."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers.api_server import ApiServer, api_server, chat_rows, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("page")) as running:
        yield running


def test_the_page_needs_no_key_runs_no_script_but_its_own_and_fetches_nothing_else(server: ApiServer) -> None:
    with httpx.Client(base_url=server.url) as anybody:
        page = anybody.get("/")
        files = {name: anybody.get(name) for name in re.findall(r'(?:href|src)="(/[^"]+)"', page.text)}
    assert {name: answer.status_code for name, answer in files.items()} == {"/page.css": 200, "/page.js": 200}
    assert "script-src 'self';" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert re.findall(r"<script(?![^>]*\bsrc=)|\bon\w+=|style=", page.text) == []
    assert [text for text in (page.text, *(a.text for a in files.values())) if re.search(r"https?://", text)] == []


def test_the_report_of_a_run_is_its_own_projects(server: ApiServer) -> None:
    client, other = server.client(), server.client("other")
    file = client.files.create(file=("chat.jsonl", chat_rows(12)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, validation_file=file, seed=1)
    wait_until(client, job.id, "succeeded")
    path = f"/v1/fine_tuning/jobs/{job.id}/report"
    with httpx.Client(base_url=server.url) as http:
        mine = http.get(path, headers={"authorization": f"Bearer {client.api_key}"})
        foreign = http.get(path, headers={"authorization": f"Bearer {other.api_key}"})
        nobody = http.get(path)
    assert (mine.status_code, foreign.status_code, nobody.status_code) == (200, 404, 401)
    assert job.id in mine.text
    assert "<svg" in mine.text


def test_a_job_without_a_run_has_no_report(server: ApiServer) -> None:
    client = server.client()
    file = client.files.create(file=("bad.jsonl", b"nope\n"), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file)
    wait_until(client, job.id, "failed")
    answer = httpx.get(
        f"{server.url}/v1/fine_tuning/jobs/{job.id}/report", headers={"authorization": f"Bearer {client.api_key}"}
    )
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        404,
        f"Job {job.id} has no report yet; its run has not begun.",
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "OWN"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),
        ({"host": "[::"}, 403),
        ({"host": "localhost:1"}, 200),
    ],
)
def test_without_a_key_only_this_machine_is_answered(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    with api_server(tmp_path) as keyless:
        sent = {name: keyless.url if value == "OWN" else value for name, value in headers.items()}
        answer = httpx.post(f"{keyless.url}/v1/uploads/none/cancel", headers=sent)
        listed = httpx.get(f"{keyless.url}/v1/models", headers=sent)
    assert listed.status_code == status
    assert answer.status_code == (404 if status == 200 else 403)
