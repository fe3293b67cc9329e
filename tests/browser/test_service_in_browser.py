"""The page of the service in headless Chromium, as a person uses it; each view is held against axe's rules.

`make page-check` runs this and leaves pictures in build/page.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.api_server import ApiServer, api_server, chat_rows, wait_until
from tests.helpers.fake_train import WAITS
from tests.helpers.paths import ROOT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (make page-check)")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (make page-check)")
CHROMIUM = shutil.which("chromium")
PICTURES = ROOT / "build" / "page"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    PICTURES.mkdir(parents=True, exist_ok=True)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield made
        made.close()


@pytest.fixture(params=["light", "dark", "phone"])
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A page that must say nothing on its console, in three guises."""
    size = {"width": 390, "height": 844} if request.param == "phone" else {"width": 1200, "height": 900}
    context = browser.new_context(viewport=size, color_scheme="dark" if request.param == "dark" else "light")
    made = context.new_page()
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: said.append(str(error)))
    made.guise = request.param
    yield made
    context.close()
    # A key that is missing or wrong is answered with 401, and a report before its run with 404.
    assert [text for text in said if "status of 401" not in text and "status of 404" not in text] == []


def picture(page: Any, name: str) -> None:
    """Take a picture, and hold the view against the rules of accessibility and the width of the screen."""
    page.screenshot(path=PICTURES / f"{name}-{page.guise}.png", full_page=True)
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]})
    assert [(v["id"], [n["html"] for n in v["nodes"]]) for v in found.response["violations"]] == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_job_from_the_key_to_the_weights(server: ApiServer, page: Any, tmp_path: Path) -> None:
    client = server.client(f"project-{page.guise}")
    page.goto(server.url)
    page.get_by_label("Key").fill("sk-wrong")
    page.keyboard.press("Enter")
    page.get_by_text("Incorrect API key provided").wait_for()
    picture(page, "login")
    page.get_by_label("Key").fill(client.api_key)
    page.keyboard.press("Enter")
    page.get_by_text("There is no job yet").wait_for()

    page.get_by_role("link", name="New job").click()
    page.locator("select[name=model] option").first.wait_for(state="attached")
    (tmp_path / "bad.jsonl").write_text("nope\n")
    (tmp_path / "chats.jsonl").write_bytes(chat_rows(12))
    page.get_by_label("Training file").set_input_files(tmp_path / "bad.jsonl")
    page.get_by_role("button", name="Upload and start").click()
    page.get_by_text("bad.jsonl: Line 1").wait_for()
    page.get_by_label("Training file").set_input_files(tmp_path / "chats.jsonl")
    page.get_by_label("Validation file").set_input_files(tmp_path / "chats.jsonl")
    page.get_by_label("Suffix").fill("mine")
    page.get_by_label("Epochs").fill("2")
    picture(page, "new")
    page.get_by_role("button", name="Upload and start").click()

    page.get_by_role("button", name="model.safetensors").wait_for()
    report = page.frame_locator("iframe")
    report.get_by_role("heading", level=1).wait_for()
    assert report.locator("svg").count() > 0
    picture(page, "job")
    with page.expect_download() as started:
        page.get_by_role("button", name="Losses of every step").click()
    started.value.save_as(tmp_path / "losses.csv")
    job = client.fine_tuning.jobs.list().data[0]
    assert job.result_files
    assert (tmp_path / "losses.csv").read_bytes() == client.files.content(job.result_files[0]).read()
    page.get_by_role("link", name="Jobs").click()
    page.get_by_role("link", name=f"mine ({job.id})").wait_for()
    picture(page, "jobs")


def test_pause_resume_cancel(server: ApiServer, page: Any) -> None:
    client = server.client(f"verbs-{page.guise}")
    file = client.files.create(file=("chat.jsonl", chat_rows(12)), purpose="fine-tune").id
    jobs = [client.fine_tuning.jobs.create(model="tiny-random", training_file=file, seed=WAITS) for _ in range(2)]
    page.add_init_script(f"sessionStorage.setItem('key', '{client.api_key}')")
    page.goto(f"{server.url}/#/jobs/{jobs[0].id}")
    page.get_by_text("Step 1/").wait_for()  # paused before its run has begun, it would begin and wait afterwards
    page.get_by_role("button", name="Pause").click()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="model.safetensors").wait_for()
    assert wait_until(client, jobs[0].id, "succeeded").fine_tuned_model
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(f"{server.url}/#/jobs/{jobs[1].id}")
    page.get_by_role("button", name="Cancel").click()
    page.locator("dd", has_text="cancelled").wait_for()
    assert wait_until(client, jobs[1].id, "cancelled").fine_tuned_model is None


def test_text_of_others_stays_text(server: ApiServer, page: Any) -> None:
    client = server.client(f"text-{page.guise}")
    file = client.files.create(file=("chat.jsonl", chat_rows(12)), purpose="fine-tune").id
    evil = "<img src=x onerror=alert(1)>"
    job = client.fine_tuning.jobs.create(model="tiny-random", training_file=file, suffix=evil, seed=1)
    page.add_init_script(f"sessionStorage.setItem('key', '{client.api_key}')")
    page.goto(server.url)
    page.get_by_role("link", name=f"{evil} ({job.id})").wait_for()
    assert page.locator("img").count() == 0
