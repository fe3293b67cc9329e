"""The Store protocol, run on every implementation: one winner, whole or nothing, nothing outside the root."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dist_ft.errors import CheckpointError
from dist_ft.storage.objects import ObjectStore, open_store
from dist_ft.storage.store import LocalStore, Store
from tests.helpers.s3 import S3Server, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    (tmp_path / "run").mkdir()
    return LocalStore(tmp_path / "run")


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "local":
        return request.getfixturevalue("local")
    return ObjectStore(f"{request.getfixturevalue('s3').new_bucket()}/run", first_wait_s=0.001)


def test_a_created_object_reads_back(store: Store) -> None:
    assert store.create_exclusive("attempts/0001.json", b"one")
    assert store.read("attempts/0001.json") == b"one"


def test_an_empty_object_reads_back(store: Store) -> None:
    assert store.create_exclusive("a", b"")
    assert store.read("a") == b""


def test_creating_a_name_twice_says_no_and_changes_nothing(store: Store) -> None:
    assert store.create_exclusive("a/b", b"first")
    assert not store.create_exclusive("a/b", b"second, and longer")
    assert store.read("a/b") == b"first"
    assert store.names("a") == ["a/b"]


def test_of_many_threads_one_creates_a_name(store: Store) -> None:
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return store.create_exclusive("attempts/0001.json", b"%d" % number)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert store.read("attempts/0001.json") == b"%d" % won.index(True)
    assert store.names("attempts") == ["attempts/0001.json"]


_RACER = """
import sys, time
from dist_ft.storage.objects import open_store
store, who, begin = open_store(sys.argv[1]), sys.argv[2], float(sys.argv[3])
time.sleep(max(0.0, begin - time.time()))
for number in range(40):
    if store.create_exclusive(f"race/{number:04d}", who.encode() * 100):
        print(number)
"""


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_of_many_processes_one_creates_each_name(kind: str, tmp_path: Path, s3: S3Server) -> None:
    root = str(tmp_path / "run") if kind == "local" else f"{s3.new_bucket()}/run"
    begin = str(time.time() + 1.5)  # after the imports of all of them
    racers = [
        subprocess.Popen([sys.executable, "-c", _RACER, str(root), who, begin], stdout=subprocess.PIPE, text=True)
        for who in "abcd"
    ]
    won = {who: racer.communicate(timeout=60)[0].split() for who, racer in zip("abcd", racers, strict=True)}
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0]
    assert sorted(int(n) for numbers in won.values() for n in numbers) == list(range(40))
    store = open_store(root)
    for who, numbers in won.items():
        for number in numbers:
            assert store.read(f"race/{int(number):04d}") == who.encode() * 100


def test_a_reader_sees_the_whole_object_or_none(store: Store) -> None:
    data = os.urandom(1 << 20)
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.append(len(store.read("folder/big")))
            except FileNotFoundError:
                continue

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            for _ in range(20):
                store.create_exclusive("folder/big", data)
                store.delete("folder")
        finally:
            done.set()
        reading.result()
    assert set(seen) <= {len(data)}


def test_a_write_that_fails_leaves_nothing(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space"):
            local.create_exclusive("a/b", b"data")
    assert local.names("") == []
    assert local.create_exclusive("a/b", b"later")


def test_reading_what_is_not_there_is_file_not_found(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    with pytest.raises(FileNotFoundError):
        store.read_range("nothing", 0, 1)


@pytest.mark.parametrize(("start", "count", "expected"), [(0, 0, b""), (0, 10, b"0123456789"), (3, 4, b"3456")])
def test_ranges(store: Store, start: int, count: int, expected: bytes) -> None:
    store.create_exclusive("a", b"0123456789")
    assert store.read_range("a", start, count) == expected


@pytest.mark.parametrize(("start", "count"), [(0, 11), (9, 2), (10, 1), (50, 1)])
def test_a_range_past_the_end_is_a_checkpoint_error(store: Store, start: int, count: int) -> None:
    store.create_exclusive("a", b"0123456789")
    with pytest.raises(CheckpointError):
        store.read_range("a", start, count)


def test_a_range_is_whole_although_the_system_reads_less_at_a_time(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create_exclusive("a", b"0123456789")
    pread = os.pread
    with monkeypatch.context() as patch:
        # Linux gives at most 0x7ffff000 bytes a call; three stand for them here.
        patch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 3), at))
        assert local.read_range("a", 1, 8) == b"12345678"


def test_lists_are_sorted_and_go_below_a_folder(store: Store) -> None:
    for name in ("b/2", "b/10", "a", "b/c/1", "bb/1"):
        store.create_exclusive(name, b"")
    assert store.names("b") == ["b/10", "b/2", "b/c/1"]
    assert store.names("none") == []
    assert store.names("") == ["a", "b/10", "b/2", "b/c/1", "bb/1"]


def test_lists_hide_what_a_killed_writer_leaves(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create_exclusive("checkpoints/step-1/manifest.json", b"{}")
    (tmp_path / "checkpoints/step-1/.slices.safetensors.0a1b2c3d").write_bytes(b"half")
    assert store.names("checkpoints") == ["checkpoints/step-1/manifest.json"]


def test_lists_hide_what_a_killed_delete_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.create_exclusive("checkpoints/step-1/manifest.json", b"{}")

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.delete("checkpoints/step-1")
    assert store.names("checkpoints") == []


def test_delete_takes_a_folder_and_nothing_else(store: Store) -> None:
    for name in ("c/1/x", "c/1/y/z", "c/10/x", "d"):
        store.create_exclusive(name, b"")
    store.delete("c/1")
    assert store.names("") == ["c/10/x", "d"]
    store.delete("c/1")  # again: nothing there, no error
    store.delete("d")  # or a single object
    assert store.names("") == ["c/10/x"]
    assert store.create_exclusive("c/1/x", b"anew")


def test_a_deleted_folder_leaves_no_bytes_behind(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create_exclusive("c/1/x", b"data")
    store.delete("c/1")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "create": lambda store, name: store.create_exclusive(name, b"x"),
    "read": lambda store, name: store.read(name),
    "read_range": lambda store, name: store.read_range(name, 0, 1),
    "list": lambda store, name: store.names(name),
    "delete": lambda store, name: store.delete(name),
}


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/hostname", ".."])
@pytest.mark.parametrize("operation", sorted(OPERATIONS))
def test_names_that_leave_the_root_are_refused(store: Store, tmp_path: Path, operation: str, name: str) -> None:
    (tmp_path / "secret").write_text("not yours")
    with pytest.raises(CheckpointError):
        OPERATIONS[operation](store, name)
    assert (tmp_path / "secret").read_text() == "not yours"


@pytest.mark.parametrize("name", ["", ".", "./"])
def test_the_root_itself_is_not_deleted(store: Store, name: str) -> None:
    store.create_exclusive("a", b"x")
    with pytest.raises(CheckpointError):
        store.delete(name)
    assert store.names("") == ["a"]


def test_a_link_that_was_made_but_reported_as_existing_counts_as_made(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def retransmitted(source: Any, target: Any) -> None:
        # NFS: the answer to the first LINK is lost, the client sends it again and is told EEXIST (open(2)).
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", retransmitted)
        assert local.create_exclusive("attempts/0001.json", b"mine")
    assert local.read("attempts/0001.json") == b"mine"


def test_what_is_put_in_parts_reads_back_and_may_be_replaced(store: Store) -> None:
    store.put("c/f", (part for part in (b"one", memoryview(b" two"), b"")))
    assert store.read("c/f") == b"one two"
    store.put("c/f", [b"three"])
    assert store.read("c/f") == b"three"
    assert store.names("c") == ["c/f"]


def test_parts_that_end_in_an_error_leave_what_was_there(store: Store) -> None:
    store.put("c/f", [b"before"])

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise CheckpointError("the rank is gone")

    for name in ("c/f", "c/new"):
        with pytest.raises(CheckpointError, match="the rank is gone"):
            store.put(name, parts())
    assert store.read("c/f") == b"before"
    assert store.names("c") == ["c/f"]


def test_folders_are_those_of_one_folder(store: Store) -> None:
    for name in ("c/1/x", "c/10/y/z", "c/file", "d/x"):
        store.create_exclusive(name, b"")
    assert store.folders("c") == ["c/1", "c/10"]
    assert store.folders("none") == []


def test_the_size_of_an_object(store: Store) -> None:
    store.create_exclusive("c/x", b"12345")
    assert store.size("c/x") == 5
    with pytest.raises(FileNotFoundError):
        store.size("c/y")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_nothing_is_put_outside_the_root(store: Store, name: str) -> None:
    with pytest.raises(CheckpointError):
        store.put(name, [b"x"])
