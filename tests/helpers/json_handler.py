"""What servers of tests that answer JSON share."""

from __future__ import annotations

import http.server
from typing import Any


class JsonHandler(http.server.BaseHTTPRequestHandler):
    """Answers with JSON and writes no log."""

    def answer(self, status: int, text: bytes) -> None:
        """Send an answer whole."""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
