"""Alerts reach a webhook signed, in order, over failures of the other side, and never disturb the run."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dist_ft.config.schema import MonitorConfig
from dist_ft.coordinator.story import alert_of
from dist_ft.errors import ConfigError
from dist_ft.monitor.alerts import SECRET_ENV, Alert, WebhookAlerts, check_alerts
from dist_ft.run.events import BatchSkipped, Committed, LedgerEntry, Recovering, RunCompleted, RunFailed

SECRET = "whsec_MfCa4o2e9lTzOJB/WMKYGO8/5Mkpg0U6iSRVUQW3bVA="


class Server(ThreadingHTTPServer):
    """Answers with the statuses that it is given, then with 200; keeps what was signed well."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.taken: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.changed = threading.Condition()

    def wait_for(self, number: int) -> list[dict[str, Any]]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.taken) >= number, 20)
        return self.taken


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        signed = f"{self.headers['webhook-id']}.{self.headers['webhook-timestamp']}.".encode() + body
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        right = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        with self.server.changed:
            status = self.server.statuses.pop(0) if self.server.statuses else 200
            self.server.ids.append(self.headers["webhook-id"])
            if status == 200 and self.headers["webhook-signature"] == f"v1,{right}":
                self.server.taken.append(json.loads(body))
            self.server.changed.notify_all()
        self.send_response(status)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/hook"


def alert(step: int) -> Alert:
    return Alert("failure", "demo", step, "rank 1 died")


def test_alerts_arrive_signed_in_order_and_once_over_errors(server: Server) -> None:
    server.statuses = [500, 429, 200, 503]
    alerts = WebhookAlerts(url(server), SECRET, first_wait_s=0.01)
    for step in (1, 2):
        alerts.send_alert(alert(step))
    taken = server.wait_for(2)
    alerts.close()
    assert [event["data"]["step"] for event in taken] == [1, 2]
    assert taken[0]["type"] == "run.failure"
    assert taken[0]["data"] == {"kind": "failure", "run": "demo", "step": 1, "text": "rank 1 died"}
    assert len(server.ids) == 5
    assert len(set(server.ids)) == 2  # a try again has the id of the first


def test_the_last_alert_is_sent_before_the_end(server: Server) -> None:
    alerts = WebhookAlerts(url(server), SECRET)
    alerts.send_alert(Alert("finished", "demo", 9, "completed after step 9"))
    alerts.close()
    assert [event["type"] for event in server.taken] == ["run.finished"]


def test_a_dead_webhook_delays_nothing() -> None:
    alerts = WebhookAlerts("http://127.0.0.1:9/hook", SECRET, first_wait_s=60)
    for step in range(2000):
        alerts.send_alert(alert(step))  # returns at once; what is too much is left out


@pytest.mark.parametrize(
    ("webhook", "secret", "said"),
    [
        ("http://example.com/x", SECRET, "monitor.webhook: expected https"),
        ("https://10.0.0.1/x", SECRET, "the address is not public"),
        ("https://user:pw@example.com/x", SECRET, "holds a secret"),
        ("https://example.com/x", "", SECRET_ENV),
        ("https://example.com/x", "hunter2", SECRET_ENV),
    ],
)
def test_a_wrong_webhook_is_refused_before_the_run(
    webhook: str, secret: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_ENV, secret)
    with pytest.raises(ConfigError, match=said) as caught:
        check_alerts(MonitorConfig(webhook=webhook))
    assert "pw" not in str(caught.value)
    assert not secret or secret not in str(caught.value)


def test_failures_hangs_and_ends_are_alerts() -> None:
    def kind(event: Any) -> str | None:
        found = alert_of("demo", LedgerEntry(1.0, 1, event))
        return found.kind if found else None

    lost = {"type": "NodeLostError", "message": "10.0.0.3 is gone"}
    hung = {"type": "StalledError", "message": "no progress for 300 s"}
    assert kind(Recovering(5, 0.0, "restart 1 of 20", lost)) == "failure"
    assert kind(Recovering(5, 0.0, "restart 2 of 20", hung)) == "hang"
    assert [kind(BatchSkipped(5)), kind(RunCompleted(5)), kind(RunFailed(5, lost))] == ["spike", "finished", "failed"]
    assert [kind(Committed(5)), kind(RunFailed(5, None))] == [None, None]
    text = alert_of("demo", LedgerEntry(1.0, 1, Recovering(5, 0.0, "restart 1 of 20", lost)))
    assert text is not None
    assert "10.0.0.3 is gone" in text.text
