"""Which address counts, and what is said when nobody of use answers there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dist_ft.errors import UsageError
from dist_ft.launchers.ray.server import JobServer, resolve_address


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # and put back what is set meanwhile


@pytest.mark.parametrize(
    ("given", "env", "expected"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://a:1"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "https://b:2/"}, "https://b:2"),
        ("http://c:3", {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://c:3"),
        ("http://[::1]:8265", {}, "http://[::1]:8265"),
    ],
)
def test_the_option_counts_before_rays_variables(
    given: str | None, env: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert resolve_address(given) == expected


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "ray://a:10001", "http://", "http://a:x", "http://[a"])
def test_what_is_no_url_of_a_dashboard_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(UsageError, match=r"--address is not .* http://127\.0\.0\.1:8265"):
        resolve_address(address)


def test_a_variable_that_is_no_url_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match="RAY_ADDRESS is not"):
        resolve_address(None)


def test_a_secret_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="without user name") as caught:
        resolve_address("http://me:hunter2@a:8265")
    assert "hunter2" not in str(caught.value)


def test_a_closed_port_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=f"no Ray dashboard answers at http://127.0.0.1:{port} .*refused"):
        JobServer(f"http://127.0.0.1:{port}")


class _Refusing(BaseHTTPRequestHandler):
    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "asks for a token; set RAY_AUTH_MODE"), (403, "refuses this token"), (404, "no Ray dashboard .*HTTP 404")],
)
def test_what_the_server_says_of_the_token_is_told_in_one_line(
    status: int, words: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Refusing, "status", status)
    with pytest.raises(UsageError, match=words) as caught:
        JobServer(server)
    assert "\n" not in str(caught.value)
