"""Files of compressed text: bytes come out as they are read. A file that ends too early is an error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, cast

import zstandard

DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading damaged bytes raises; bzip2 says `OSError` without a number."""

_BUFFER_BYTES = 1 << 18
_READ_BYTES = 1 << 15  # of a zstd file at once: a few of them can stand for very much text


def decompressed(stored: BinaryIO, compression: str | None) -> BinaryIO:
    """Returns the text of a file; closing it leaves `stored` open."""
    if compression is None:
        return stored
    return io.BufferedReader(cast("io.RawIOBase", _READERS[compression](stored)), _BUFFER_BYTES)


class _Zstd(io.RawIOBase):
    """Zstandard frames one after the other. The library's own reader takes a file that was cut short for whole."""

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._is_inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._stored.read(_READ_BYTES)
            if not data:
                if self._is_inside:
                    raise EOFError("Compressed file ended before the end of a frame")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        text = []
        while data:
            text.append(self._frame.decompress(data))
            self._is_inside = not self._frame.eof
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        return b"".join(text)


_READERS: Mapping[str, Callable[[BinaryIO], Any]] = {
    "gzip": lambda stored: gzip.GzipFile(fileobj=stored),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _Zstd,
}
