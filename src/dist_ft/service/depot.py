"""Where files, jobs and runs lie: a directory, or a URL with a directory of this machine in front of it.

At a URL, what the service writes is sent on before anybody is told of it, and what is not here is brought when it is
asked for. So the directory may be lost with its machine: the index is made anew from the URL.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from dist_ft.layout import user_cache_dir
from dist_ft.run.place import Run, open_run
from dist_ft.storage.objects import open_store
from dist_ft.storage.publish import written_beside
from dist_ft.storage.store import PART_BYTES, Store, file_parts
from dist_ft.storage.urls import checked_store_url, is_url


@dataclass(frozen=True)
class Depot:
    """A service's store.

    Attributes:
        path: Its directory on this machine.
        address: Path or URL, the same for all machines.
        remote: What lies at the URL; None: the directory is the store.
    """

    path: Path
    address: str
    remote: Store | None = None

    def address_of(self, path: Path) -> str:
        """Return where runs and other machines find a file or folder of the directory."""
        return str(path) if self.remote is None else f"{self.address}/{self._name(path)}"

    def send(self, *paths: Path) -> None:
        """Send files to the URL."""
        if self.remote is not None:
            for path in paths:
                self.remote.put(self._name(path), file_parts(path))

    def bring(self, path: Path) -> Path:
        """Return a file, brought here if it is not."""
        if self.remote is not None and not path.exists():
            self._fetch(self._name(path))
        return path

    def bring_all(self, folder: Path, *names: str) -> None:
        """Bring every file below a folder that has one of these names, and is not here."""
        if self.remote is not None:
            for found in self.remote.names(self._name(folder)):
                if found.rpartition("/")[2] in names:
                    self.bring(self.path / found)

    def bring_folder(self, folder: Path) -> Path:
        """Return a folder, with all its files here."""
        if self.remote is not None:
            for found in self.remote.names(self._name(folder)):
                self.bring(self.path / found)
        return folder

    def remove(self, folder: Path) -> None:
        """Remove a folder, here and there."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.remote is not None:
            self.remote.delete(self._name(folder))

    def run(self, name: str) -> Run:
        """Return a run, which may not have begun. At a URL its records are those that were fetched last."""
        path = self.path / "runs" / name
        if self.remote is not None:
            path.mkdir(parents=True, exist_ok=True)
        return _opened(self.address_of(path), path)

    def _fetch(self, name: str) -> None:
        assert self.remote is not None
        size, path = self.remote.size(name), self.path / name
        parts = (
            self.remote.read_range(name, start, min(PART_BYTES, size - start)) for start in range(0, size, PART_BYTES)
        )
        with written_beside(path, parts, is_durable=False) as temporary:
            temporary.replace(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


@lru_cache(maxsize=1024)
def _opened(address: str, scratch: Path) -> Run:
    """Open a run once: a client of an object store is slow to make."""
    return open_run(address, scratch=scratch)


def open_depot(address: str) -> Depot:
    """Open the store at a path or URL, and make its directory.

    Raises:
        ConfigError: The URL is none of a store, or holds secrets.
        OSError: The directory cannot be made.
    """
    if not is_url(address):
        path = Path(address).absolute()
        path.mkdir(parents=True, exist_ok=True)
        return Depot(path, str(path))
    url = checked_store_url(address)
    path = user_cache_dir() / "service" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path.mkdir(parents=True, exist_ok=True)
    return Depot(path, url, open_store(url))
