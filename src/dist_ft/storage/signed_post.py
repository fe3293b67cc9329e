"""Sends signed webhooks, as the Standard Webhooks specification says, to addresses that may be called.

An address must be public and speak https, or be this machine itself. It is judged when it is called, and the call goes
to the address that was judged. Redirects are not followed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import secrets
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

from dist_ft.storage.urls import is_loopback

LIMIT_S = 10.0
"""Seconds for each word of the other side."""
SECRET_PREFIX = "whsec_"


def new_secret() -> str:
    """Return a new secret: `whsec_` and base64."""
    return f"{SECRET_PREFIX}{base64.b64encode(secrets.token_bytes(32)).decode()}"


def check_secret(secret: str) -> None:
    """Check the form of a secret.

    Raises:
        ValueError: It is not `whsec_` and base64.
    """
    if not secret.startswith(SECRET_PREFIX) or not base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True):
        raise ValueError(f"expected {SECRET_PREFIX} and base64")


def check_url(url: str) -> None:
    """Check that a URL may be called, as far as that can be said without a look-up.

    Raises:
        ValueError: It may not; the message says why, without the URL, which may hold a token.
    """
    parts = urlsplit(url)
    host, _ = parts.hostname, parts.port
    if not host or parts.scheme not in ("http", "https") or parts.username is not None:
        raise ValueError("expected https://HOST/… without user info")
    if parts.scheme == "http" and not is_loopback(host):
        raise ValueError("expected https")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return
    if not literal.is_global and not literal.is_loopback:
        raise ValueError("the address is not public")


def send_signed(url: str, event_id: str, event: Mapping[str, object], active_secrets: Sequence[str]) -> int:
    """Send an event, signed with every secret, and return the HTTP status.

    Raises:
        OSError: Nobody answers, or the address is not allowed.
        http.client.HTTPException: The answer is not HTTP.
    """
    body = json.dumps(event, separators=(",", ":")).encode()
    at = int(time.time())
    headers = {
        "content-type": "application/json", "user-agent": "dist-ft", "webhook-id": event_id,
        "webhook-timestamp": str(at),
        "webhook-signature": " ".join(_signature(secret, event_id, at, body) for secret in active_secrets),
    }  # fmt: skip
    return _post(urlsplit(url), body, headers)


def _signature(secret: str, event_id: str, at: int, body: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    signed = hmac.new(key, f"{event_id}.{at}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


def _post(url: SplitResult, body: bytes, headers: dict[str, str]) -> int:
    """Send a body to an address that was judged; return the status."""
    host = str(url.hostname)
    is_secure = url.scheme == "https"
    port = url.port or (443 if is_secure else 80)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        judged = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if not (judged.is_loopback if is_loopback(host) else judged.is_global):
            raise PermissionError(f"{host} is not a public address")
    kind = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    connection = kind(host, port, timeout=LIMIT_S)
    sock = socket.create_connection((str(found[0][4][0]), port), LIMIT_S)
    try:
        connection.sock = ssl.create_default_context().wrap_socket(sock, server_hostname=host) if is_secure else sock
        target = f"{url.path or '/'}{f'?{url.query}' if url.query else ''}"
        connection.request("POST", target, body, headers)
        return connection.getresponse().status
    finally:
        connection.close()
        sock.close()
