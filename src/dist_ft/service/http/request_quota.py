"""How many requests a project may send: a bucket of tokens each, refilled evenly, emptied by one a request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dist_ft.service.wire import ApiError


@dataclass(frozen=True)
class Taken:
    """What is left after a request.

    Attributes:
        limit: Requests a minute.
        remaining: Requests that may be sent at once.
        reset_s: Seconds until all of `limit` may be sent at once.
    """

    limit: int
    remaining: int
    reset_s: float

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's headers of a limit."""
        return [
            (b"x-ratelimit-limit-requests", str(self.limit).encode()),
            (b"x-ratelimit-remaining-requests", str(self.remaining).encode()),
            (b"x-ratelimit-reset-requests", f"{self.reset_s:.3f}s".encode()),
        ]


class RequestQuota:
    """Counts the requests of each project in this process.

    Args:
        per_minute: Requests a minute; None: as many as they like.
        now: Seconds of a clock that never goes back.
    """

    def __init__(self, per_minute: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._now = per_minute, now
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, project: str) -> Taken | None:
        """Count a request; None where there is no limit.

        Raises:
            ApiError: The project has sent too many.
        """
        if self._per_minute is None:
            return None
        limit, now = self._per_minute, self._now()
        left, at = self._left.get(project, (float(limit), now))
        left = min(float(limit), left + (now - at) * limit / 60)
        if left < 1:
            self._left[project] = (left, now)
            error = ApiError(
                429,
                f"Rate limit reached for requests of project {project}: limit {limit} a minute. Try again in "
                f"{(1 - left) * 60 / limit:.1f} s.",
                code="rate_limit_exceeded",
            )
            error.headers["retry-after"] = str(int((1 - left) * 60 / limit) + 1)
            error.headers |= {name.decode(): value.decode() for name, value in Taken(limit, 0, 60.0).headers()}
            raise error
        self._left[project] = (left - 1, now)
        return Taken(limit, int(left - 1), (limit - left + 1) * 60 / limit)
