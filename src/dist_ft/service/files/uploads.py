"""Uploads in parts: created, filled, and turned into a file when they are complete."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dist_ft.service.depot import Depot
from dist_ft.service.files.shelf import Readable, Shelf
from dist_ft.service.index import Index, Row
from dist_ft.service.wire import ApiError, Json, Object, bad_request, new_id, read_record, shown
from dist_ft.storage.publish import beside, write_json
from dist_ft.typed_json import from_json

MAX_UPLOAD_BYTES = 8 * 2**30
MAX_PART_BYTES = 64 * 2**20
LASTS_S = 3600
_CHUNK = 1 << 20
_MAX_PARTS = 10_000


@dataclass(frozen=True)
class Upload:
    """An upload in parts, as its JSON holds it."""

    id: str
    project: str
    bytes: int
    filename: str
    purpose: str
    created_at: int
    expires_at: int
    status: str
    file_lasts_s: int | None = None
    file: str | None = None


class Uploads:
    """The uploads of a store.

    Args:
        depot: Where they lie. Parts lie on this machine alone: after its loss an upload has to be made again.
        index: Where they are listed.
        shelf: Takes the files.
    """

    def __init__(self, depot: Depot, index: Index, shelf: Shelf) -> None:
        self._depot, self._index, self._shelf = depot, index, shelf

    def create(self, upload: Upload) -> None:
        """Add an upload, or keep its new state."""
        path = self._folder(upload) / "upload.json"
        write_json(path, asdict(upload))
        self._depot.send(path)
        self._index.put("upload", Row(upload.id, upload.project, upload.status, asdict(upload)))

    def find(self, upload_id: str, project: str) -> Upload:
        """Return an upload of a project.

        Raises:
            ApiError: There is none.
        """
        row = self._index.get("upload", upload_id, project)
        if row is None:
            raise ApiError(404, f"No such Upload object: {upload_id[:100]}", "id")
        upload = from_json(Upload, row.data)
        if upload.status == "pending" and upload.expires_at <= time.time():
            return self._end(upload, "expired")
        return upload

    def pending(self, upload_id: str, project: str) -> Upload:
        """Return an upload that takes parts.

        Raises:
            ApiError: There is none, or it has ended.
        """
        upload = self.find(upload_id, project)
        if upload.status != "pending":
            raise bad_request(f"Upload {upload.id} has status {upload.status}; expected pending.")
        return upload

    def add_part(self, upload: Upload, source: Readable) -> str:
        """Keep a part and return its id.

        Raises:
            ApiError: There are too many.
        """
        folder = self._folder(upload)
        if sum(1 for _ in folder.glob("part_*")) >= _MAX_PARTS:
            raise bad_request(f"An upload has at most {_MAX_PARTS} parts.", "data")
        path = folder / new_id("part_")
        temporary = beside(path)
        with temporary.open("wb") as file:
            while chunk := source.read(_CHUNK):
                file.write(chunk)
        temporary.replace(path)
        return path.name

    def complete(self, upload: Upload, part_ids: Json, md5: Json) -> Upload:
        """Join the parts into a file.

        Raises:
            ApiError: Parts are missing, or size or MD5 are not as they were said to be.
        """
        if not isinstance(part_ids, list) or not part_ids or len(part_ids) > _MAX_PARTS:
            raise bad_request("'part_ids' must be a non-empty list of the ids of parts.", "part_ids")
        own = {path.name: path for path in self._folder(upload).glob("part_*")}
        paths = []
        for part_id in part_ids:
            if not isinstance(part_id, str) or part_id not in own:
                raise bad_request(f"No such Part object: {shown(part_id)}", "part_ids")
            paths.append(own[part_id])
        size = sum(path.stat().st_size for path in paths)
        if size != upload.bytes:
            message = f"The parts have {size} bytes together, but the upload was created with {upload.bytes}."
            raise bad_request(message, "part_ids")
        if md5 is not None and Joined(paths).md5() != md5:
            raise bad_request("The parts do not have this MD5.", "md5")
        lasts_s = upload.file_lasts_s
        stored = self._shelf.add(Joined(paths), upload.filename, upload.purpose, upload.project, lasts_s)
        return self._end(replace(upload, file=stored.id), "completed")

    def cancel(self, upload: Upload) -> Upload:
        """End an upload without a file."""
        return self._end(upload, "cancelled")

    def to_wire(self, upload: Upload) -> Object:
        """Return the API's object."""
        stored = None if upload.file is None else self._shelf.find(upload.file, upload.project)
        return {
            "id": upload.id, "object": "upload", "bytes": upload.bytes, "created_at": upload.created_at,
            "filename": upload.filename, "purpose": upload.purpose, "status": upload.status,
            "expires_at": upload.expires_at, "file": None if stored is None else stored.to_wire(),
        }  # fmt: skip

    def relist(self) -> None:
        """List every upload of the store in a new index."""
        folder = self._depot.path / "uploads"
        self._depot.bring_all(folder, "upload.json")
        uploads = [read_record(Upload, path) for path in folder.glob("*/upload.json")]
        for upload in sorted(uploads, key=lambda upload: upload.created_at):
            self._index.put("upload", Row(upload.id, upload.project, upload.status, asdict(upload)))

    def _end(self, upload: Upload, status: str) -> Upload:
        ended = replace(upload, status=status)
        self.create(ended)
        for path in self._folder(upload).glob("part_*"):
            path.unlink(missing_ok=True)
        return ended

    def _folder(self, upload: Upload) -> Path:
        return self._depot.path / "uploads" / upload.id


class Joined:
    """Reads several files one after the other as one stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._chunks = self._read(paths)

    @staticmethod
    def _read(paths: list[Path]) -> Iterator[bytes]:
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk

    def read(self, _: int = -1, /) -> bytes:
        """Return the next bytes; none at the end."""
        return next(self._chunks, b"")

    def md5(self) -> str:
        """Return the MD5 of the whole, which is a checksum of the transfer and no more."""
        digest = hashlib.md5(usedforsecurity=False)
        for chunk in self._read(self._paths):
            digest.update(chunk)
        return digest.hexdigest()
