"""Repeats calls to a remote store whose failures may pass by themselves. Knows libraries only by name."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_CHANCE = random.SystemRandom()

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
    """Return the HTTP status that an error of a store's library goes back to, however it spells it."""
    while error is not None:
        answer = getattr(error, "response", None)
        # One at a time: aiohttp warns where its old spelling, `code`, is so much as looked at.
        for owner, name in ((error, "status"), (error, "status_code"), (error, "code"), (answer, "status_code")):
            if str(status := getattr(owner, name, None)).isdigit():  # gcsfs has text
                return int(str(status))
        if (
            isinstance(answer, dict)
            and str(status := answer.get("ResponseMetadata", {}).get("HTTPStatusCode")).isdigit()
        ):
            return int(str(status))
        error = error.__cause__
    return None


def error_code(error: BaseException | None) -> str | None:
    """Return the error code of an S3 answer that an error goes back to, if any."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code"))
        error = error.__cause__
    return None


def is_passing(status: int) -> bool:
    """Return whether another try may help, by the HTTP status of the answer."""
    return status in _PASSING_STATUS or status >= 500


def will_pass(error: BaseException) -> bool:
    """Return whether another try may help."""
    if {cls.__name__ for cls in type(error).__mro__} & _PASSING_NAMES or isinstance(error, TimeoutError):
        return True
    status = http_status(error)
    return status is not None and is_passing(status)


def retried(
    call: Callable[[], T],
    what: str,
    first_wait_s: float = FIRST_WAIT_S,
    *,
    num_tries: int | None = None,
    give_up_s: float = math.inf,
    may_pass: Callable[[Exception], bool] = will_pass,
) -> T:
    """Call until it works, as long as its failures are of those that pass; wait longer each time.

    Args:
        call: What is asked; must bear to be done twice.
        what: For the log.
        first_wait_s: Seconds before the second try, give or take half of it.
        num_tries: The most tries; None is `NUM_TRIES`.
        give_up_s: Seconds after which no further try is made: a client may have waits of its own.
        may_pass: Whether a failure is of those that pass.
    """
    last, began = (num_tries or NUM_TRIES) - 1, time.monotonic()
    for number in range(last):
        try:
            return call()
        except Exception as error:
            if not may_pass(error) or time.monotonic() - began > give_up_s:
                raise
            said = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            logger.info("%s: try %d failed: %s", what, number + 1, said)
            # Some chance in it, or a thousand readers would come back at once.
            time.sleep(first_wait_s * 2**number * _CHANCE.uniform(0.5, 1.5))
    return call()
