"""Passes requests for answers on to `dist-ft serve`, which is started here at the first one and ended when idle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from dist_ft.errors import UsageError
from dist_ft.machine import OWN_PYTHON
from dist_ft.service import DATABASE_ENV
from dist_ft.service.depot import Depot
from dist_ft.service.wire import ApiError

logger = logging.getLogger(__name__)

_START_LIMIT_S = 300.0
_LOOK_EVERY_S = 0.25
_PASSED_ON = ("authorization", "content-type", "openai-project", "openai-organization")
_NO_LIMIT = httpx.Timeout(None, connect=10.0)


@dataclass(frozen=True)
class ServingChoice:
    """Who answers requests for answers.

    Attributes:
        mode: `auto` starts `dist-ft serve` here, `off` refuses; otherwise the URL of one that runs, without `/v1`.
        idle_s: Seconds without a request after which it is ended.
        database: URL of the index; None is SQLite in the store.
        catalogue: YAML of base models; None is the embedded one.
    """

    mode: str = "off"
    idle_s: float = 900.0
    database: str | None = None
    catalogue: Path | None = None

    def __post_init__(self) -> None:
        """Check the mode.

        Raises:
            UsageError: It is none.
        """
        if self.mode not in ("auto", "off") and not self.mode.startswith(("http://", "https://")):
            raise UsageError(f"--serving {self.mode} is none of auto, off, http://HOST:PORT")


OFF = ServingChoice()


@dataclass(frozen=True)
class Passed:
    """An answer that is passed on: its status, headers, and body as it comes."""

    status: int
    headers: dict[str, str]
    body: AsyncIterator[bytes]


class Inference:
    """Whoever answers.

    Args:
        depot: The service's store.
        choice: Who it is.
    """

    def __init__(self, depot: Depot, choice: ServingChoice) -> None:
        self._depot, self._choice = depot, choice
        self._client = httpx.AsyncClient(timeout=_NO_LIMIT, limits=httpx.Limits(max_connections=None))
        self._process: subprocess.Popen[bytes] | None = None
        self._url = choice.mode.rstrip("/")
        self._starting = asyncio.Lock()
        self._num_open = 0
        self._used = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    @property
    def is_off(self) -> bool:
        """Whether nobody answers."""
        return self._choice.mode == "off"

    async def pass_on(self, path: str, headers: Mapping[str, str], body: bytes) -> Passed:
        """Send a request on; return its answer as soon as that begins.

        Raises:
            ApiError: Nobody answers.
        """
        self._num_open += 1
        try:
            url = await self._running()
            kept = {name: headers[name] for name in _PASSED_ON if name in headers}
            request = self._client.build_request("POST", f"{url}{path}", headers=kept, content=body)
            answer = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            self._close_one()
            raise _unavailable(f"The inference server does not answer ({type(error).__name__}); try again.") from error
        except BaseException:
            self._close_one()
            raise
        told = {name: answer.headers[name] for name in ("content-type", "retry-after") if name in answer.headers}
        return Passed(answer.status_code, told, self._body(answer))

    async def close(self) -> None:
        """End what was started here."""
        if self._watch is not None:
            self._watch.cancel()
        await self._client.aclose()
        await self._end()

    async def _body(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()
            self._close_one()

    def _close_one(self) -> None:
        self._num_open -= 1
        self._used = time.monotonic()

    async def _running(self) -> str:
        """Return the URL of a server that answers."""
        if self._choice.mode != "auto":
            return self._url
        async with self._starting:  # the first one starts it, the others wait
            if self._process is None or self._process.poll() is not None:
                await self._start()
        return self._url

    async def _start(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        log = self._depot.path / "serving" / "serve.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*OWN_PYTHON, "-m", "dist_ft.cli", "serve", "--store", self._depot.address, "--port", str(port)]
        if self._choice.catalogue is not None:
            command += ["--catalogue", str(self._choice.catalogue)]
        env = None if self._choice.database is None else {**os.environ, DATABASE_ENV: self._choice.database}
        with log.open("wb") as output:
            # It ends with its standard input, so that it does not outlive this process.
            self._process = subprocess.Popen(
                [*command, "--leased"],
                env=env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        logger.info("starting the inference server at %s, log in %s", self._url, log)
        deadline = time.monotonic() + _START_LIMIT_S
        while not await self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                await self._end()
                said = log.read_text(errors="replace").strip().splitlines()
                raise _unavailable(f"The inference server did not start: {said[-1][:500] if said else 'no output'}")
            await asyncio.sleep(_LOOK_EVERY_S)
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_idle())

    async def _is_healthy(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await self._client.get(f"{self._url}/health", timeout=5)).status_code == 200
        return False

    async def _end_when_idle(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self._choice.idle_s))
            async with self._starting:
                is_idle = not self._num_open and time.monotonic() - self._used > self._choice.idle_s
                if self._process is not None and is_idle:
                    logger.info("ending the inference server, which was idle for %.0f s", self._choice.idle_s)
                    await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 30)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        finally:
            if process.stdin is not None:
                process.stdin.close()


def _unavailable(message: str) -> ApiError:
    error = ApiError(503, message, None, "serving_unavailable", "server_error")
    error.headers["retry-after"] = "5"
    return error
