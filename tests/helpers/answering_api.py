"""An API on loopback that answers chats and texts in OpenAI's form, and can be told to be busy, or to end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class AnsweringApi:
    """What is asked of the API, and what it says.

    Attributes:
        url: Its address, with `/v1`.
        refuse: Returns (status, headers) for a request that is refused, by its body.
        choice: What is answered in place of a choice that makes sense.
        asked: The bodies of all requests that were answered, with the route and the key.
    """

    url: str
    refuse: Callable[[dict[str, Any]], tuple[int, dict[str, str]] | None] = lambda body: None
    choice: dict[str, Any] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def answering_api() -> Iterator[AnsweringApi]:
    """Answers `<last word>!` to every prompt; one that ends with `long` is cut, one that ends with `tool` is a call."""
    api = AnsweringApi("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            refused = api.refuse(body)
            if refused is not None:
                self._send(refused[0], {"error": {"message": "not now"}}, refused[1])
                return
            api.asked.append(body | {"route": self.path, "key": self.headers.get("Authorization")})
            is_chat = self.path == "/v1/chat/completions"
            word = (body["messages"][-1]["content"] if is_chat else body["prompt"]).split()[-1]
            message: dict[str, Any] = {"role": "assistant", "content": f"{word}!"}
            if word == "tool":
                call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
                message = {"role": "assistant", "content": None, "tool_calls": [call]}
            said = {"message": message} if is_chat else {"text": f"{word}!"}
            choice = said | {"finish_reason": "length" if word == "long" else "stop"}
            self._send(200, {"choices": [choice if api.choice is None else api.choice]}, {})

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
