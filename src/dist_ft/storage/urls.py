"""Recognises, checks and redacts the addresses of object stores. Opens nothing."""

from __future__ import annotations

import ipaddress
import re

from dist_ft.errors import ConfigError
from dist_ft.printable import printable

S3, GOOGLE, AZURE = frozenset({"s3", "s3a"}), frozenset({"gs", "gcs"}), frozenset({"az", "abfs", "abfss"})
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)
_SECRET_NAME = re.compile(r"sig|token|key|secret|credential|password|auth", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][\w.-]*")
_AZURE_HOST = re.compile(r"[A-Za-z0-9][\w-]*@[A-Za-z0-9][\w.-]*")


def is_url(address: str) -> bool:
    """Return whether an address is a URL and not a path."""
    return _URL.match(address) is not None


def redacted(url: str) -> str:
    """Return a URL without its parts that may be secret: user info, query and fragment."""
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    # A password may hold a slash, which then ends the host too early.
    tail = f"{host}{slash}{path}"
    hidden = f"***@{tail.rpartition('@')[2]}" if "@" in tail and not _AZURE_HOST.fullmatch(host) else tail
    return f"{scheme}://{hidden}" + ("?***" if re.search(r"[?#]", rest) else "")


def shown_url(text: str) -> str:
    """Return text in which no URL has user info or a signature left, safe for a terminal."""
    return printable(_URL_IN_TEXT.sub(lambda match: without_secrets(match[0]), text))


def without_secrets(address: str) -> str:
    """Return an address without user info and signatures: it names the same file, but may not open it.

    Unlike `redacted` it keeps the rest of a query, which may say which file is meant. Identities of files are made of
    it, so it may not change.
    """
    if not is_url(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    user, at, server = host.rpartition("@")
    if at and (":" in user or scheme.lower() in ("http", "https", "ftp", "sftp", "ssh")):
        host = f"***@{server}"
    path, mark, query = path.partition("?")
    pairs = []
    for pair in query.split("&"):
        name, equals, _ = pair.partition("=")
        pairs.append(f"{name}=***" if equals and _SECRET_NAME.search(name) else pair)
    return f"{scheme}://{host}{slash}{path}{mark}{'&'.join(pairs)}"


def checked_store_url(url: str) -> str:
    """Return the URL of a folder in an object store, without a slash at its end.

    Raises:
        ConfigError: It holds secrets, names no bucket, or a store without exclusive creation.
    """
    shown = redacted(url)
    if shown != url:
        raise ConfigError(
            f"{shown}: user info and signatures do not belong into a URL, which is stored and shown; take them out and "
            "set credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, a role of the machine)"
        )
    scheme, _, rest = url.partition("://")
    scheme, (host, _, path) = scheme.lower(), rest.rstrip("/").partition("/")
    if scheme not in S3 | GOOGLE | AZURE:
        raise ConfigError(
            f"{url}: a store without exclusive creation is refused, and {scheme}:// is not known to have it; "
            "use s3://, gs://, az:// or a path"
        )
    if not (_BUCKET.fullmatch(host) or (scheme in AZURE and _AZURE_HOST.fullmatch(host))):
        raise ConfigError(f"{url}: names no bucket; write {scheme}://BUCKET/FOLDER")
    if path and any(part in ("", ".", "..") for part in path.split("/")):
        raise ConfigError(f"{url}: an empty name, `.` or `..` in it; object stores take names literally")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Return whether a name or address is this machine's own, which nobody else reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
