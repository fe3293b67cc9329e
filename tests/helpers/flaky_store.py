"""An fsspec file system in memory that can be told to fail: `flaky://…`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyStore(MemoryFileSystem):
    """Fails its next calls with the errors in `failures`, one a call; keeps the ranges that were read."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception | bytes]] = []
    ranges: ClassVar[list[tuple[int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def info(self, path: str, **kwargs: Any) -> Any:
        self._fail()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._fail()
        return super().ls(path, detail=detail, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        if (short := self._fail()) is not None:
            return short
        assert start is not None and end is not None
        self.ranges.append((start, end))
        data: bytes = super().cat_file(path, start, end, **kwargs)
        return data

    def _fail(self) -> bytes | None:
        """Raises the next failure; one that is bytes is a wrong answer."""
        if not self.failures:
            return None
        failure = self.failures.pop(0)
        if isinstance(failure, bytes):
            return failure
        raise failure


@contextmanager
def flaky_store(**files: bytes) -> Iterator[type[FlakyStore]]:
    """Gives an empty store with these files in its folder `d`; `_` in a name stands for a dot."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.store, FlakyStore.failures, FlakyStore.ranges = {}, [], []
    fs = FlakyStore()
    for name, content in files.items():
        fs.pipe(f"/d/{name.replace('_', '.')}", content)
    yield FlakyStore
    FlakyStore.failures.clear()
