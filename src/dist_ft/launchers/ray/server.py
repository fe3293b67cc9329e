"""Connects to the job server of a Ray cluster, which is its dashboard, and explains failures in one line.

Ray's own client waits long for a machine that does not answer, and explains a refused token in a paragraph.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from dist_ft.errors import DistFtError, UsageError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_TALKERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Ray's loggers that report uploads and closed connections."""
_ANSWER_LIMIT_S = 5.0
_REQUEST_LIMIT_S = 30.0
_OPEN_CLUSTER = (
    "the cluster at {address} asks for no token: whoever reaches it runs code there (docs/security.md); start its Ray "
    "with RAY_AUTH_MODE=token"
)


class _Client(JobSubmissionClient):
    """Ray's client with a time limit; its own requests have none."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_REQUEST_LIMIT_S, **options)


class JobServer:
    """The jobs of one cluster. Every method raises DistFtError if the server does not answer any more.

    Args:
        address: URL of the dashboard; None takes it from the environment.

    Attributes:
        address: The URL.
        warnings: Lines for the user.

    Raises:
        UsageError: It is no such URL, no dashboard answers there, or it refuses the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = resolve_address(address)
        self.warnings = [_OPEN_CLUSTER.format(address=self.address)] if _is_open(self.address) else []
        os.environ[_ADDRESS_VARIABLES[0]] = self.address  # Ray's client prefers the environment to its argument
        for name in _TALKERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._explained():
            self._client: Any = _Client(self.address)

    def submit(self, submission_id: str, **job: Any) -> None:
        """Start a job; `job` as in Ray's `submit_job`."""
        with self._explained():
            self._client.submit_job(submission_id=submission_id, **job)

    def info(self, submission_id: str) -> JobDetails:
        """Return what the server knows of a job.

        Raises:
            UsageError: There is no such job.
        """
        with self._explained():
            try:
                return self._client.get_job_info(submission_id)
            except RuntimeError as error:
                if "404" not in str(error).partition(":")[0]:
                    raise
                raise UsageError(
                    f"{submission_id} is neither a run directory here nor a job of the cluster at {self.address}"
                ) from error

    def jobs(self) -> list[JobDetails]:
        """Return all jobs, also those that have ended."""
        with self._explained():
            return list(self._client.list_jobs())

    def stop(self, submission_id: str) -> None:
        """Send a job its stop signal; do not wait."""
        with self._explained():
            self._client.stop_job(submission_id)

    def logs(self, submission_id: str) -> str:
        """Return what a job's driver has written so far."""
        with self._explained():
            return str(self._client.get_job_logs(submission_id))

    async def tail(self, submission_id: str) -> AsyncIterator[str]:
        """Yield what the driver writes, from the beginning, until the job has ended."""
        with self._explained():
            async for text in self._client.tail_job_logs(submission_id):
                yield text

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            was_refused = "failed" in str(error).partition(":")[0]
            what = "refuses this token" if was_refused else "asks for a token"
            raise UsageError(
                f"the cluster at {self.address} {what}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) as on its machines"
            ) from error
        except DistFtError:
            raise
        # Those of `requests` are OSErrors. The last two: an answer that is none of Ray's.
        except (OSError, RuntimeError, aiohttp.ClientError, ValueError, KeyError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DistFtError(f"the job server at {self.address}: {said[:500]}") from error


def resolve_address(address: str | None) -> str:
    """Return the dashboard's URL: the given one, else Ray's variables, else this machine.

    Raises:
        UsageError: It is not http(s)://HOST:PORT.
    """
    named = {"--address": address, **{name: os.environ.get(name) for name in _ADDRESS_VARIABLES}}
    origin, found = next(((key, value) for key, value in named.items() if value), ("", _DEFAULT_ADDRESS))
    try:
        parts = urlsplit(found)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket left open
        is_url = False
    if not is_url or "@" in found:  # user info would be shown and stored
        raise UsageError(
            f"{origin} is not the URL of a Ray dashboard such as {_DEFAULT_ADDRESS}; name it with --address, without "
            "user name or token"
        )
    return found.rstrip("/")


def _is_open(address: str) -> bool:
    """Send a request without a token, and return whether the server answers it."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=_ANSWER_LIMIT_S):
            return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        reason: object = f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else type(error).__name__
    raise UsageError(
        f"no Ray dashboard answers at {address} ({reason}); it is on the head, port 8265 by default, and `ray start "
        "--head` must have it (ray[default], without --include-dashboard=false)"
    )
