"""Which failures are tried again. The errors are made here, as botocore, aiohttp and gcsfs make them."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.storage.retry import NUM_TRIES, http_status, retried, will_pass


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int, code: str = "") -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """As gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class ClientPayloadError(Exception):
    """As aiohttp's."""


def _translated(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (_translated(OSError("slow down"), ClientError(503)), True),
        (_translated(OSError("too many"), ClientError(429)), True),
        (_translated(OSError("conflict"), ClientError(409)), True),
        (HttpError(500), True),
        (_translated(ClientPayloadError(), HttpError(400)), True),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (_translated(PermissionError("denied"), ClientError(403)), False),
        (_translated(FileNotFoundError("none"), ClientError(404)), False),
        (_translated(FileExistsError("there"), ClientError(412)), False),
        (HttpError(404), False),
        (ValueError("ours"), False),
    ],
)
def test_what_passes_by_itself(error: Exception, passes: bool) -> None:
    assert will_pass(error) is passes


def test_the_status_is_found_below_a_translated_error() -> None:
    assert http_status(_translated(OSError(), _translated(OSError(), ClientError(416)))) == 416
    assert http_status(OSError()) is None


@pytest.mark.parametrize("failures", [0, 1, NUM_TRIES - 1])
def test_it_is_asked_until_it_answers(failures: int) -> None:
    asked: list[int] = []

    def call() -> str:
        asked.append(1)
        if len(asked) <= failures:
            raise TimeoutError
        return "answer"

    assert retried(call, "x", first_wait_s=0.0) == "answer"
    assert len(asked) == failures + 1


@pytest.mark.parametrize(("error", "tries"), [(TimeoutError(), NUM_TRIES), (ValueError(), 1)])
def test_it_is_not_asked_for_ever(error: Exception, tries: int) -> None:
    asked: list[int] = []

    def call() -> Any:
        asked.append(1)
        raise error

    with pytest.raises(type(error)):
        retried(call, "x", first_wait_s=0.0)
    assert len(asked) == tries
