"""Webhooks: endpoints with secrets, and events on their way to them. They live in the index only.

`storage/signed_post.py` signs and calls, and says which addresses may be called.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace

from dist_ft.service.index import Index, Row
from dist_ft.service.wire import ApiError, Json, Object, as_text, bad_request, made_id, new_id, shown
from dist_ft.storage.signed_post import LIMIT_S, check_url, new_secret, send_signed
from dist_ft.typed_json import from_json

logger = logging.getLogger(__name__)

EVENT_TYPES = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
_OLD_SECRET_S = 24 * 3600
_GIVE_UP_S = 72 * 3600
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 3600.0
_LEASE, _LEASE_S = "postman", 60.0


@dataclass(frozen=True)
class Endpoint:
    """Where events go.

    Attributes:
        secret: Signs what is sent: `whsec_` and base64.
        old_secret: The one before, which signs, too, until `old_until`.
    """

    id: str
    project: str
    name: str
    url: str
    event_types: list[str]
    secret: str
    created_at: int
    updated_at: int
    old_secret: str | None = None
    old_until: float = 0.0

    def to_wire(self, with_secret: bool = False) -> Object:
        """Return the API's object; the secret is in it where it is new."""
        made: Object = {
            "id": self.id, "object": "webhook_endpoint", "created_at": self.created_at, "updated_at": self.updated_at,
            "name": self.name, "url": self.url, "event_types": list(self.event_types),
            "signing_secret_hint": f"{self.secret[:8]}…",
        }  # fmt: skip
        return {**made, "signing_secret": self.secret} if with_secret else made


@dataclass(frozen=True)
class Delivery:
    """An event on its way to an endpoint."""

    id: str
    endpoint: str
    event: Object
    tries: int
    next_at: float


class Webhooks:
    """Keeps endpoints and sends them what happens.

    Args:
        index: Where both are kept.
        every_s: Seconds between two looks for something to send.
    """

    def __init__(self, index: Index, every_s: float = 0.5) -> None:
        self._index, self._every_s = index, every_s
        self._name = new_id("postman-", 12)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="postman", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """End; what was not sent is sent after the next start."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(LIMIT_S + 5)
        self._index.give_lease_back(_LEASE, self._name)

    def create(self, body: Object, project: str) -> Endpoint:
        """Add an endpoint.

        Raises:
            ApiError: Name, URL or event types are not possible.
        """
        now = int(time.time())
        made = Endpoint(new_id("we_"), project, "", "", [], new_secret(), now, now)
        return self._keep(_with(made, {"name": None, "url": None, "event_types": None, **body}))

    def find(self, endpoint_id: str, project: str) -> Endpoint:
        """Return an endpoint of a project.

        Raises:
            ApiError: There is none.
        """
        row = self._index.get("webhook", endpoint_id, project)
        if row is None:
            raise ApiError(404, f"No such webhook endpoint: {endpoint_id[:100]}", "id")
        return from_json(Endpoint, row.data)

    def update(self, endpoint: Endpoint, body: Object) -> Endpoint:
        """Change an endpoint.

        Raises:
            ApiError: Name, URL or event types are not possible.
        """
        changed = _with(endpoint, body)
        return endpoint if changed == endpoint else self._keep(replace(changed, updated_at=int(time.time())))

    def rotate(self, endpoint: Endpoint, keep_old: bool) -> Endpoint:
        """Give an endpoint a new secret."""
        until = time.time() + _OLD_SECRET_S if keep_old else 0.0
        old = endpoint.secret if keep_old else None
        now = int(time.time())
        return self._keep(replace(endpoint, secret=new_secret(), old_secret=old, old_until=until, updated_at=now))

    def page(self, project: str, after: str | None, limit: int) -> tuple[list[Endpoint], bool]:
        """Return a page of endpoints, the newest first, and whether there are more."""
        rows, has_more = self._index.listed("webhook", project, after, limit)
        return [from_json(Endpoint, row.data) for row in rows], has_more

    def delete(self, endpoint: Endpoint) -> None:
        """Remove an endpoint; nothing more is sent to it."""
        self._index.delete("webhook", endpoint.id)

    def announce(self, project: str, event_type: str, object_id: str) -> None:
        """Send an event to every endpoint of a project that asks for its type."""
        for row in self._index.every("webhook", project=project):
            endpoint = from_json(Endpoint, row.data)
            if event_type in endpoint.event_types:
                event = _event(event_type, object_id, made_id("evt_", endpoint.id, event_type, object_id))
                self._put(Delivery(str(event["id"]), endpoint.id, event, 0, 0.0), project)

    def send(self, endpoint: Endpoint, event: Object) -> int:
        """Send an event now, and return the endpoint's HTTP status.

        Raises:
            OSError: Nobody answers, or the address is not allowed.
        """
        has_old = endpoint.old_secret and endpoint.old_until > time.time()
        active = [endpoint.secret, *([endpoint.old_secret] if endpoint.old_secret and has_old else [])]
        return send_signed(endpoint.url, str(event["id"]), event, active)

    def test(self, endpoint: Endpoint, event_type: Json) -> int:
        """Send an example of an event, and return the endpoint's HTTP status.

        Raises:
            ApiError: There is no such type, or nobody answers.
        """
        if event_type not in EVENT_TYPES:
            raise bad_request(
                f"Invalid 'event_type': {shown(event_type)}; known: {', '.join(EVENT_TYPES)}.", "event_type"
            )
        try:
            return self.send(endpoint, _event(str(event_type), "ftjob-test", new_id("evt_")))
        except (OSError, http.client.HTTPException) as error:
            raise bad_request(f"The endpoint cannot be reached ({type(error).__name__}).", "url") from error

    def deliver_due(self) -> None:
        """Send once whatever is due."""
        for row in self._index.every("delivery"):
            due = from_json(Delivery, row.data)
            now = time.time()
            if due.next_at > now or self._closing.is_set():
                continue
            target = self._index.get("webhook", due.endpoint, row.project)
            if target is None or now - float(str(due.event["created_at"])) > _GIVE_UP_S:
                self._index.delete("delivery", due.id)
                continue
            try:
                status = self.send(from_json(Endpoint, target.data), due.event)
            except (OSError, http.client.HTTPException) as error:
                logger.info("webhook %s: %s", due.endpoint, type(error).__name__)
                status = 0
            if 200 <= status < 300:
                self._index.delete("delivery", due.id)
            else:
                wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(due.tries, 20))
                self._put(replace(due, tries=due.tries + 1, next_at=now + wait_s), row.project)

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                if self._index.take_lease(_LEASE, self._name, _LEASE_S):
                    self.deliver_due()
            except Exception:
                logger.exception("webhooks could not be sent; the next try is in %g s", self._every_s)

    def _keep(self, endpoint: Endpoint) -> Endpoint:
        self._index.put("webhook", Row(endpoint.id, endpoint.project, "", asdict(endpoint)))
        return endpoint

    def _put(self, delivery: Delivery, project: str) -> None:
        self._index.put("delivery", Row(delivery.id, project, delivery.endpoint, asdict(delivery)))


def _event(event_type: str, object_id: str, event_id: str) -> Object:
    now = int(time.time())
    return {"id": event_id, "object": "event", "type": event_type, "created_at": now, "data": {"id": object_id}}


def _with(endpoint: Endpoint, body: Object) -> Endpoint:
    """Return an endpoint with the members of a body, checked."""
    if "name" in body:
        endpoint = replace(endpoint, name=as_text(body["name"], "name", 200))
    if "url" in body:
        url = as_text(body["url"], "url", 2000)
        try:
            check_url(url)
        except ValueError as error:
            raise bad_request(f"Invalid 'url': {error}.", "url") from error
        endpoint = replace(endpoint, url=url)
    if "event_types" in body:
        types = body["event_types"]
        if not isinstance(types, list) or not types or not all(kind in EVENT_TYPES for kind in types):
            raise bad_request(f"Invalid 'event_types': a non-empty list of {', '.join(EVENT_TYPES)}.", "event_types")
        endpoint = replace(endpoint, event_types=sorted({str(kind) for kind in types}))
    return endpoint
