"""Serves the run that `make smoke` has left, and asks it for orders as JSON through the openai client.

Run it with `make serve-smoke`, after `make smoke`. It needs about a minute on two cores.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI, OpenAIError

_LIMIT_S = 300.0
_ORDERS = (
    "I'd like 7 candles in any color, shipped to Chicago. Alex here. High priority.",
    "Two red lamps to Boston for Maria please, no hurry.",
)


def main(run: Path) -> int:
    """Ask a run; return 0 if every answer is a JSON object."""
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "dist_ft.cli", "serve", str(run), "--port", str(port)])
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        name = _first_model(client, server)
        seconds = {"listed": _since(began)}
        for order in _ORDERS:
            found = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": order}], temperature=0, max_tokens=80
            )
            text = found.choices[0].message.content or ""
            print(f"request  {order}\nanswer   {text}\n")
            if not isinstance(json.loads(text), dict):
                return 1
            seconds.setdefault("first_answer", _since(began))
        print(json.dumps({"model": name, **seconds, "seconds": _since(began)}))
        return 0
    finally:
        server.terminate()
        server.wait(60)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def _newest() -> Path:
    """Return the newest run of `make smoke`."""
    found = sorted(path.parent.parent for path in Path("runs").glob("smoke-*/exports/final"))
    if not found:
        sys.exit("there is no finished run runs/smoke-*; run `make smoke` first, or name a run")
    return found[-1]


def _first_model(client: OpenAI, server: subprocess.Popen[bytes]) -> str:
    """Return the name of the result, once the server answers."""
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            return client.models.list().data[0].id
        except OpenAIError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else _newest()))
