"""Alerts: what a person should learn at once, sent to a signed webhook and to sinks that have alerts."""

from __future__ import annotations

import http.client
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, runtime_checkable

from dist_ft.config.schema import MonitorConfig
from dist_ft.errors import ConfigError
from dist_ft.monitor.sink import Sink
from dist_ft.storage.signed_post import check_secret, check_url, send_signed
from dist_ft.storage.urls import shown_url, without_secrets

logger = logging.getLogger(__name__)

SECRET_ENV = "DIST_FT_WEBHOOK_SECRET"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_CLOSE_LIMIT_S = 20.0
_MAX_WAITING = 1000


@dataclass(frozen=True)
class Alert:
    """What happened.

    Attributes:
        kind: failure and hang are followed by a new attempt; failed, finished and stopped end the run; spike is a
            step that is left out.
        run: Name of the run.
        step: Completed steps.
        text: What happened, in one line.
    """

    kind: Literal["failure", "hang", "spike", "failed", "finished", "stopped"]
    run: str
    step: int
    text: str

    @property
    def is_bad(self) -> bool:
        """Whether something went wrong."""
        return self.kind not in ("finished", "stopped")


@runtime_checkable
class AlertReceiver(Protocol):
    """Takes alerts. Calls return at once, and a failure never disturbs the run."""

    def send_alert(self, alert: Alert) -> None:
        """Take an alert."""
        ...


class WebhookAlerts:
    """Sends alerts to a webhook, in order, each until it is taken; `close` ends the tries.

    The event is `{id, object: event, type: run.<kind>, created_at, data: {kind, run, step, text}}`, signed as the
    webhooks of the service are.

    Args:
        url: The webhook.
        secret: Signs what is sent.
        first_wait_s: Seconds before the second try.
    """

    def __init__(self, url: str, secret: str, first_wait_s: float = _FIRST_WAIT_S) -> None:
        self._url, self._secret, self._first_wait_s = url, secret, first_wait_s
        self._queue: queue.Queue[Alert | None] = queue.Queue(_MAX_WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)
        self._thread.start()

    def send_alert(self, alert: Alert) -> None:
        """See `AlertReceiver`. An alert that finds a thousand before it is left out."""
        try:
            self._queue.put_nowait(alert)
        except queue.Full:
            logger.warning("an alert is left out, because the webhook takes none: %s", alert.text)

    def close(self) -> None:
        """Send what waits, each with one more try, within 20 s."""
        self._closing.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(_CLOSE_LIMIT_S)

    def _run(self) -> None:
        while (alert := self._queue.get()) is not None:
            event_id = f"evt_{uuid.uuid4().hex}"  # the same for all tries, so that the other side can tell
            event = {
                "id": event_id, "object": "event", "type": f"run.{alert.kind}", "created_at": int(time.time()),
                "data": asdict(alert),
            }  # fmt: skip
            wait_s = self._first_wait_s
            while not self._is_taken(event_id, event):
                if self._closing.wait(wait_s):
                    self._is_taken(event_id, event)
                    break
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def _is_taken(self, event_id: str, event: Mapping[str, object]) -> bool:
        try:
            status = send_signed(self._url, event_id, event, [self._secret])
        except (OSError, http.client.HTTPException) as error:
            logger.warning("the webhook for alerts does not answer: %s", type(error).__name__)
            return False
        if not 200 <= status < 300:
            logger.warning("the webhook for alerts answers with %d", status)
        return 200 <= status < 300


def check_alerts(config: MonitorConfig) -> None:
    """Check the webhook before a run starts.

    Raises:
        ConfigError: Its URL may not be called, or its secret is missing or wrong.
    """
    if config.webhook is None:
        return
    if without_secrets(config.webhook) != config.webhook:
        raise ConfigError(
            f"monitor.webhook={shown_url(config.webhook)} holds a secret, which would be kept in the run directory; "
            f"the other side can know us by the signature with {SECRET_ENV}"
        )
    try:
        check_url(config.webhook)
    except ValueError as error:
        raise ConfigError(f"monitor.webhook: {error}; name another one, or remove it") from error
    try:
        check_secret(os.environ.get(SECRET_ENV, ""))
    except ValueError as error:
        raise ConfigError(
            f"monitor.webhook needs the secret that signs what is sent in {SECRET_ENV}: {error}; set it where the "
            "driver runs (on a cluster: at `ray start` on the head)"
        ) from error


def build_alerts(config: MonitorConfig, sinks: Sequence[Sink]) -> tuple[list[AlertReceiver], WebhookAlerts | None]:
    """Return who takes the alerts of a run, and the webhook among them, which must be closed.

    Raises:
        ConfigError: The secret is not in the environment of this process, whose machine may have another one.
    """
    check_alerts(config)
    webhook = None if config.webhook is None else WebhookAlerts(config.webhook, os.environ.get(SECRET_ENV, ""))
    receivers: list[AlertReceiver] = [sink for sink in sinks if isinstance(sink, AlertReceiver)]
    return [*receivers, *([webhook] if webhook else [])], webhook
