"""What a source is when a run begins, and that nothing of it changes unseen."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.config.data_sections import RowSource
from dist_ft.data.rows.scan import scan_part
from dist_ft.data.sources import listing
from dist_ft.data.sources.listing import check_frozen, check_unchanged, content_identity, list_files
from dist_ft.data.sources.parts import whole
from dist_ft.data.sources.source_file import SourceFile
from dist_ft.errors import DataError
from tests.helpers.flaky_store import FlakyStore, flaky_store

ROW = b'{"text": "x"}\n'
LONG_AGO_NS = 10**18


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to be hashed."""
    found: list[str] = []
    real = listing._hash_bytes

    def counted(path: Path) -> str:
        found.append(path.name)
        return real(path)

    monkeypatch.setattr(listing, "_hash_bytes", counted)
    return found


def write(path: Path, content: bytes = ROW, at_ns: int = LONG_AGO_NS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(at_ns, at_ns))
    return path


def files_of(path: Path | str) -> list[SourceFile]:
    return list_files(RowSource(source=str(path)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write(tmp_path / "d" / f"{name}.jsonl", ROW * (1 + (name == "b")))
    return tmp_path / "d"


def test_a_second_start_reads_nothing(folder: Path, reads: list[str]) -> None:
    first = files_of(folder)
    assert sorted(reads) == ["a.jsonl", "b.jsonl"]
    assert files_of(folder) == first
    assert len(reads) == 2
    assert [(file.size, file.identity[:5]) for file in first] == [(14, "xxh3:"), (28, "xxh3:")]


def test_a_hash_is_not_believed_after_a_change(folder: Path, reads: list[str]) -> None:
    first = files_of(folder)
    write(folder / "a.jsonl", ROW.replace(b"x", b"y"), LONG_AGO_NS + 1)
    again = files_of(folder)
    assert again[0].identity != first[0].identity
    assert again[1] == first[1]
    assert reads.count("a.jsonl") == 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, time.time_ns())
    first = content_identity(path)[0]
    stamp = path.stat().st_mtime_ns
    write(path, ROW.replace(b"x", b"y"), stamp)  # as a clock of seconds would have it
    assert content_identity(path)[0] != first


def test_a_kept_hash_that_is_damaged_or_cannot_be_kept_costs_a_reading(
    folder: Path, own_cache: Path, reads: list[str]
) -> None:
    first = files_of(folder)
    for kept in own_cache.rglob("*.json"):
        kept.write_text("{")
    assert files_of(folder) == first
    for kept in own_cache.rglob("*.json"):
        kept.unlink()
        kept.mkdir()
    assert files_of(folder) == first
    assert len(reads) == 6


def test_starts_at_once_do_not_disturb_one_another(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(files_of, [folder] * 16))
    assert all(files == found[0] for files in found)


def test_a_pattern_names_files(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "d" / "c.csv", b"q\n")
    write(tmp_path / "e" / "c.jsonl")
    assert [Path(f.address).name for f in files_of(tmp_path / "*" / "*.jsonl")] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert [f.address for f in files_of(f"file://{folder}/[a].jsonl")] == [str(folder / "a.jsonl")]
    assert len(files_of(f"{tmp_path}/**/*.jsonl")) == 3
    with pytest.raises(DataError, match=r"\*\.parquet matches no files"):
        files_of(folder / "*.parquet")
    with pytest.raises(DataError, match="holds jsonl and csv files"):
        files_of(folder / "*")


def test_a_name_that_looks_like_a_pattern_is_a_name_first(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl")
    assert len(files_of(tmp_path / "a[1].jsonl")) == 1


def test_a_list_survives_json_without_its_secrets() -> None:
    file = SourceFile("https://me:pw@h/a.jsonl?sig=x", "jsonl", None, 5, "etag:1:5")
    kept = json.loads(json.dumps(file.to_dict()))
    assert "pw" not in str(kept) and "sig=x" not in str(kept)
    assert SourceFile.from_dict({**kept, "extra": 1}) == replace(file, address="https://***@h/a.jsonl?sig=***")
    check_frozen([SourceFile.from_dict(kept)], [replace(file, address="https://me:pw2@h/a.jsonl?sig=y")])


def test_what_is_the_same_passes_whenever_it_was_touched(folder: Path) -> None:
    frozen = files_of(folder)
    write(folder / "a.jsonl", ROW, LONG_AGO_NS + 5)
    check_frozen(frozen, files_of(folder))
    check_unchanged(frozen[0])


@pytest.mark.parametrize("content", [ROW * 2, ROW.replace(b"x", b"y")], ids=["longer", "as long"])
def test_a_changed_file_is_named_with_what_was_and_is(folder: Path, content: bytes) -> None:
    frozen = files_of(folder)
    write(folder / "a.jsonl", content, LONG_AGO_NS + 5)
    now = files_of(folder)
    says = (
        rf"d/a\.jsonl has changed .* 14 bytes \({frozen[0].identity}\), now {len(content)} bytes \({now[0].identity}\)"
    )
    for check in (lambda: check_frozen(frozen, now), lambda: check_unchanged(frozen[0])):
        with pytest.raises(DataError, match=says) as caught:
            check()
        assert "start another run (run.name)" in str(caught.value)


def test_a_file_that_vanished_or_appeared_is_named(folder: Path) -> None:
    frozen = files_of(folder)
    with pytest.raises(DataError, match=r"b\.jsonl \(28 bytes .* was not there when the run began"):
        check_frozen(frozen[:1], frozen)
    with pytest.raises(DataError, match=r"b\.jsonl is gone; it had 28 bytes"):
        check_frozen(frozen, frozen[:1])
    with pytest.raises(DataError, match="another order"):
        check_frozen(frozen, frozen[::-1])
    (folder / "b.jsonl").unlink()
    with pytest.raises(DataError, match=r"b\.jsonl cannot be read: No such file.*it had 28 bytes"):
        check_unchanged(frozen[1])


@pytest.mark.parametrize("changes_at", [0, 2])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path, changes_at: int) -> None:
    path = write(tmp_path / "a.jsonl", ROW * 5)
    source = RowSource(source=str(path))
    rows = scan_part(whole(list_files(source)), source)
    for _ in range(changes_at):
        next(rows)
    write(path, ROW * 6, LONG_AGO_NS + 5)
    with pytest.raises(DataError, match=r"a\.jsonl has changed since the run began"):
        list(rows)


@pytest.fixture
def store() -> Iterator[type[FlakyStore]]:
    with flaky_store(a_jsonl=ROW * 5, b_jsonl=ROW) as made:
        yield made


def test_remote_files_are_listed_without_being_read_and_checked_when_they_are(store: type[FlakyStore]) -> None:
    source = RowSource(source="flaky://d/*.jsonl")
    files = list_files(source)
    assert store.ranges == []
    assert len(list(scan_part(whole(files), source))) == 6
    store().pipe("/d/b.jsonl", ROW.replace(b"x", b"y"))
    with pytest.raises(DataError, match=r"b\.jsonl has changed since the run began"):
        list(scan_part(whole(files), source))
    store().rm("/d/b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl: no such file or folder; it had 14 bytes"):
        list(scan_part(whole(files), source))


def test_a_remote_source_that_is_refused_is_a_data_error(store: type[FlakyStore]) -> None:
    store.failures.append(PermissionError("Forbidden"))
    with pytest.raises(DataError, match=r"flaky://d/a\.jsonl: access is refused"):
        files_of("flaky://d/a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_pointer_to_data_is_refused_as_what_it_is(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2690605\n")
    with pytest.raises(DataError, match=r"/a\.\S+ is a pointer of Git LFS, not the file itself; fetch it"):
        list_files(RowSource(source=str(tmp_path / name)))
