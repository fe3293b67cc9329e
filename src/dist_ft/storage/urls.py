"""Addresses of data: paths and URLs, what is needed to read a URL, and how it is shown without its secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping

import fsspec

from dist_ft.printable import printable

_EXTRAS: Mapping[str, str] = {
    "s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure",
}  # fmt: skip
_LOCAL = ("file://", "local://")
_SECRET_NAME = re.compile(r"sig|token|key|secret|credential|password|auth", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def is_url(address: str) -> bool:
    """Whether an address is read through fsspec; `file://` is a path."""
    return "://" in address and not address.startswith(_LOCAL)


def without_scheme(address: str) -> str:
    """Returns the path that a `file://` address names; any other address as it is."""
    return next((address.removeprefix(scheme) for scheme in _LOCAL if address.startswith(scheme)), address)


def shown_url(text: str) -> str:
    """Returns text in which no URL has user info or a signature left, safe for a terminal."""
    return printable(_URL.sub(lambda match: _redacted(match[0]), text))


def without_secrets(address: str) -> str:
    """Returns an address without user info and signatures: it names the same file, but may not open it."""
    return _redacted(address) if is_url(address) else address


def missing_package(address: str) -> str | None:
    """Says what is to be installed to read a URL, or that nothing can; None when it can be read."""
    scheme = address.partition("://")[0].lower()
    if "::" in address:
        return "URLs that are joined by `::` are not read; name the file itself"
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        extra = _EXTRAS.get(scheme)
        install = f"pip install dist-ft[{extra}]" if extra else f"pip install the fsspec package for {scheme}"
        return f"reading {scheme}:// needs a package that is not installed; run `{install}`"
    except ValueError:
        return f"{scheme}:// is no known kind of address; use s3://, gs://, az://, https:// or hf://"
    return None


def _redacted(url: str) -> str:
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    user, at, server = host.rpartition("@")
    if at and (":" in user or scheme.lower() in ("http", "https", "ftp", "sftp", "ssh")):
        host = f"***@{server}"
    path, mark, query = path.partition("?")
    pairs = [_without_value(pair) for pair in query.split("&")]
    return f"{scheme}://{host}{slash}{path}{mark}{'&'.join(pairs)}"


def _without_value(pair: str) -> str:
    name, equals, _ = pair.partition("=")
    return f"{name}=***" if equals and _SECRET_NAME.search(name) else pair
