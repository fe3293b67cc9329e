"""Which failures of a remote store pass by themselves, and asking again until they do. Knows no library but by name."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

NUM_TRIES = 8
"""With `FIRST_WAIT_S`, doubled each time, about 25 s in all: an outage longer than that is the caller's."""
FIRST_WAIT_S = 0.2
_PASSING_STATUS = frozenset({408, 409, 425, 429})  # 409: two conditional puts of one name at a time (S3)
_PASSING_NAMES = frozenset(
    {
        "HTTPClientError", "ConnectionError", "ResponseParserError",  # botocore, requests
        "ClientPayloadError", "ClientConnectionError", "FSTimeoutError", "IncompleteRead", "ContentLengthError",
        "ChecksumError", "ServiceRequestError", "ServiceResponseError",  # gcsfs, Azure
    }
)  # fmt: skip


def http_status(error: BaseException | None) -> int | None:
    """Returns the HTTP status that an error of a store's library goes back to, if any."""
    for name in ("code", "status_code"):  # gcsfs, Azure
        code = str(getattr(error, name, ""))
        if code.isdigit():
            return int(code)
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        error = error.__cause__
    return None


def error_code(error: BaseException | None) -> str | None:
    """Returns the error code of an S3 answer that an error goes back to, if any."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code"))
        error = error.__cause__
    return None


def will_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if {cls.__name__ for cls in type(error).__mro__} & _PASSING_NAMES or isinstance(error, TimeoutError):
        return True
    status = http_status(error)
    return status is not None and (status in _PASSING_STATUS or status >= 500)


def retried(call: Callable[[], T], what: str, first_wait_s: float = FIRST_WAIT_S) -> T:
    """Calls until it works, as long as its failures are of those that pass; waits longer each time.

    Args:
        call: What is asked; must bear to be done twice.
        what: For the log.
        first_wait_s: Seconds before the second try, give or take half of it.
    """
    for number in range(NUM_TRIES - 1):
        try:
            return call()
        except Exception as error:
            if not will_pass(error):
                raise
            logger.info("%s: try %d failed: %s", what, number + 1, _first_line(error))
            time.sleep(first_wait_s * 2**number * random.uniform(0.5, 1.5))
    return call()


def _first_line(error: Any) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[:1]}"
