"""Every kind of file, however compressed, gives the same rows wherever it lies."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import pytest
import zstandard

from dist_ft.config.data_sections import RowSource
from dist_ft.data.sources import readers as files_module
from dist_ft.data.sources.listing import list_files
from dist_ft.data.sources.parts import cut_parts
from dist_ft.data.sources.readers import decompressed, read_piece
from dist_ft.errors import DataError
from tests.unit.data.sources.test_readers import ROWS, WRITERS, file_at

PLAIN = [name for name in WRITERS if not name.endswith(".gz")]
TEXT = [name for name in PLAIN if name.rpartition(".")[2] in ("jsonl", "ndjson", "json", "csv", "tsv")]
COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
NAMES = [*PLAIN, *(f"{name}{ending}" for name in TEXT for ending in COMPRESS)]


def write(folder: Path, name: str) -> Path:
    """Writes `ROWS` as the file that a name says."""
    path = folder / name
    if name in PLAIN:
        WRITERS[name](path, ROWS)
        return path
    plain = write(folder, path.stem)
    path.write_bytes(COMPRESS[path.suffix](plain.read_bytes()))
    plain.unlink()
    return path


def rows_at(address: str, part_bytes: int = 2000) -> list[object]:
    parts = cut_parts(list_files(RowSource(source=address)), part_bytes)
    return [row.data for part in parts for p in part.pieces for row in read_piece(p.file, p.start, p.stop)]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_reads_from_a_path_a_pattern_and_a_url(tmp_path: Path, name: str) -> None:
    content = write(tmp_path, name).read_bytes()
    store = fsspec.filesystem("memory")
    store.pipe(f"/rows/{tmp_path.name}/{name}", content)
    folder = f"memory://rows/{tmp_path.name}"
    ending = "".join(Path(name).suffixes)
    for address in (
        str(tmp_path / name), f"file://{tmp_path}/*{ending}", f"{folder}/{name}", f"{folder}/*{ending}", folder,
    ):  # fmt: skip
        assert rows_at(address) == ROWS, address


@pytest.mark.parametrize("ending", COMPRESS)
def test_members_one_after_the_other_are_read(tmp_path: Path, ending: str) -> None:
    lines = [b'{"a": 1}\n', b'{"a": 2}\n']
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(map(COMPRESS[ending], lines)))
    assert rows_at(str(tmp_path / f"a.jsonl{ending}")) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("damage", [lambda data: b"nothing of the kind", lambda data: data[: len(data) // 2]])
def test_a_damaged_file_is_named(tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(damage(COMPRESS[ending](b'{"a": "%d"}\n' % 7 * 5000)))
    with pytest.raises(DataError, match=r"a\.jsonl\.\w+ is damaged"):
        rows_at(str(path))


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_empty_file_has_no_rows(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](b""))
    assert rows_at(str(tmp_path / f"a.jsonl{ending}")) == []


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_line_that_fills_the_memory_is_refused_compressed_too(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "MAX_LINE_BYTES", 1000)
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](b"x" * 10_000_000))
    with pytest.raises(DataError, match="a row a line"):
        rows_at(str(tmp_path / f"a.jsonl{ending}"))


def test_what_is_stored_stays_open(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl.zst")
    with file_at(path).open() as stored:
        with decompressed(stored, "zstd") as opened:
            assert opened.readline()
        assert not stored.closed
