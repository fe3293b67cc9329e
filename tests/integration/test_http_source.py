"""Rows read from a web server, one that serves ranges and one that does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import read_rows, scan_part
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import cut_parts, whole
from dist_ft.errors import DataError
from dist_ft.storage import remote

ROWS = b"".join(b'{"text": "row %d"}\n' % n for n in range(500))


class Plain(SimpleHTTPRequestHandler):
    """Serves whole files only, as Python's own server does; every third GET is refused with 503."""

    num_gets = 0

    def do_GET(self) -> None:
        type(self).num_gets += 1
        if type(self).num_gets % 3 == 0:
            self.send_error(503)
        else:
            self.serve()

    def serve(self) -> None:
        super().do_GET()

    def log_message(self, *arguments: Any) -> None:
        pass


class Ranged(Plain):
    """Serves ranges, too."""

    def serve(self) -> None:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().serve()
            return
        content = path.read_bytes()
        first, last = asked.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[Plain, Ranged])
def site(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(ROWS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", request.param
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["d/a.jsonl", "d/*.jsonl", "d/"])
def test_rows_are_read_from_a_server_that_fails_now_and_then(site: tuple[str, Any], name: str) -> None:
    source = RowSource(source=f"{site[0]}/{name}")
    files = list_files(source)
    parts = cut_parts(files, 2000)
    assert len(parts) == (5 if site[1] is Ranged else 1)
    rows = [row for part in parts for row in scan_part(part, source)]
    assert [row.raw["text"] for row in rows] == [f"row {n}" for n in range(500)]
    assert rows[-1].place == f"{site[0]}/d/a.jsonl:500"


def test_a_file_that_is_not_there_or_changes_is_named(site: tuple[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/d/b\.jsonl: no such file or folder"):
        list(read_rows(RowSource(source=f"{site[0]}/d/b.jsonl")))
    source = RowSource(source=f"{site[0]}/d/a.jsonl")
    part = whole(list_files(source))
    (tmp_path / "d" / "a.jsonl").write_bytes(ROWS + ROWS)
    with pytest.raises(DataError, match=r"/d/a\.jsonl has changed since the run began"):
        list(scan_part(part, source))
