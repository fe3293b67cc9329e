"""Keeps files in the store: content under a name of its own, and a JSON beside it.

A user's file name is only text in that JSON. Content gets its name when it is whole.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dist_ft.service.depot import Depot
from dist_ft.service.files.file_rules import FileCheck, check_file
from dist_ft.service.index import Index, Row
from dist_ft.service.wire import Object, new_id, read_record
from dist_ft.storage.publish import beside, write_json
from dist_ft.typed_json import from_json

PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
RESULTS = "fine-tune-results"
MAX_FILE_BYTES = 512 * 2**20
_CHUNK = 1 << 20


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int = -1, /) -> bytes:
        """Return the next bytes; none at the end."""
        ...


@dataclass(frozen=True)
class StoredFile:
    """A file, as its JSON holds it.

    Attributes:
        id: Its id.
        project: Whose it is.
        filename: What the user calls it.
        purpose: What it is for.
        bytes: Its size.
        created_at: Unix time.
        expires_at: When it goes; None: never.
        status: `processed` or `error`.
        status_details: All faults, one a line.
        sha256: Hash of the content.
        format: See `FileCheck`, of a file for fine-tuning.
        num_examples: See `FileCheck`.
        num_characters: See `FileCheck`.
    """

    id: str
    project: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    expires_at: int | None
    status: str
    status_details: str | None
    sha256: str
    format: str | None = None
    num_examples: int = 0
    num_characters: int = 0

    def to_wire(self) -> Object:
        """Return the API's object."""
        return {
            "object": "file", "id": self.id, "purpose": self.purpose, "filename": self.filename, "bytes": self.bytes,
            "created_at": self.created_at, "expires_at": self.expires_at, "status": self.status,
            "status_details": self.status_details,
        }  # fmt: skip


class Shelf:
    """The files of a store.

    Args:
        depot: Where they lie.
        index: Where they are listed.
    """

    def __init__(self, depot: Depot, index: Index) -> None:
        self._depot = depot
        self._index = index

    def content(self, file_id: str) -> Path:
        """Return the path of a file's content."""
        return self._depot.bring(self._folder(file_id) / "content.jsonl")

    def add(
        self,
        source: Readable,
        filename: str,
        purpose: str,
        project: str,
        lasts_s: int | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """Copy a stream into the store and check it; a file of the same id is replaced."""
        file_id = file_id or new_id("file-")
        target = self._folder(file_id) / "content.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, digest, size = beside(target), hashlib.sha256(), 0
        try:
            with temporary.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    size += len(chunk)
                    digest.update(chunk)
                    out.write(chunk)
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(target.parent, ignore_errors=True)
            raise
        check = check_file(target) if purpose == "fine-tune" else FileCheck()
        now = int(time.time())
        stored = StoredFile(
            file_id, project, filename, purpose, size, now, None if lasts_s is None else now + lasts_s,
            "error" if check.num_faults else "processed", check.describe(), digest.hexdigest(), check.format,
            check.num_examples, check.num_characters,
        )  # fmt: skip
        record = target.with_name("file.json")
        write_json(record, asdict(stored))
        self._depot.send(target, record)
        self._list(stored)
        return stored

    def find(self, file_id: str, project: str) -> StoredFile | None:
        """Return a file; None if there is none, it has expired, or it belongs to another project."""
        row = self._index.get("file", file_id, project)
        if row is None:
            return None
        stored = from_json(StoredFile, row.data)
        if stored.expires_at is not None and stored.expires_at <= time.time():
            self.delete(stored)
            return None
        return stored

    def page(
        self, project: str, after: str | None, limit: int, purpose: str | None, is_ascending: bool
    ) -> tuple[list[StoredFile], bool]:
        """Return a page of files, and whether there are more."""
        rows, has_more = self._index.listed("file", project, after, limit, purpose, is_ascending)
        now = time.time()
        files = [from_json(StoredFile, row.data) for row in rows]
        return [file for file in files if file.expires_at is None or file.expires_at > now], has_more

    def delete(self, stored: StoredFile) -> None:
        """Delete a file and its content."""
        self._index.delete("file", stored.id)
        self._depot.remove(self._folder(stored.id))

    def bytes_of(self, project: str) -> int:
        """Return the bytes of all files of a project."""
        return sum(from_json(StoredFile, row.data).bytes for row in self._index.every("file", project=project))

    def relist(self) -> None:
        """List everything that lies in the store in a new index."""
        files = self._depot.path / "files"
        self._depot.bring_all(files, "file.json")
        found = [read_record(StoredFile, path) for path in files.glob("*/file-*/file.json")]
        for stored in sorted(found, key=lambda stored: stored.created_at):
            self._list(stored)

    def _list(self, stored: StoredFile) -> None:
        self._index.put("file", Row(stored.id, stored.project, stored.purpose, asdict(stored)))

    def _folder(self, file_id: str) -> Path:
        return self._depot.path / "files" / file_id.removeprefix("file-")[:2] / file_id


def plain_name(name: str) -> str:
    """Return a file name without folders and control characters, as it is shown later."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(letter for letter in last if letter.isprintable())
    return kept[:255] if kept.strip(". ") else "upload"
