"""What an object store does to its clients: answers late, half, twice or not at all. Against moto on loopback."""

from __future__ import annotations

import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Iterator

import pytest

from dist_ft.checkpoint.manifest import verify_files
from dist_ft.errors import CheckpointError, ConfigError, StorageError
from dist_ft.slices import WrittenFile
from dist_ft.storage import objects
from dist_ft.storage.objects import ObjectStore, check_exclusive_creation, open_store
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest
from tests.helpers.s3 import SECRET, Fault, S3Server, s3_server

PART = 5 * 2**20  # the least that S3 takes


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setattr(objects, "CHUNK_BYTES", PART)
    server.faults.clear()
    return server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return ObjectStore(f"{bucket}/run", first_wait_s=0.001)


def test_refused_requests_are_made_again(s3: S3Server, store: ObjectStore) -> None:
    s3.faults += [Fault("503", method, "run|delete", times=3) for method in ("PUT", "GET", "HEAD", "POST")]
    assert store.create_exclusive("a", b"0123456789")
    store.put("b", [b"x"])
    assert store.read("a") == b"0123456789"
    assert store.read_range("a", 2, 3) == b"234"
    assert store.size("a") == 10
    assert store.names("") == ["a", "b"]
    store.delete("b")
    assert store.names("") == ["a"]
    assert [fault.done for fault in s3.faults] == [3, 3, 3, 3]


def test_a_store_that_keeps_refusing_is_an_error_that_names_the_object(s3: S3Server, store: ObjectStore) -> None:
    s3.faults.append(Fault("503", "PUT", "run", times=1000))
    with pytest.raises(ConnectionError, match=r"s3://bucket-\w+/run/folder/x: .*Reduce your request rate") as caught:
        store.create_exclusive("folder/x", b"")
    assert SECRET not in str(caught.value)
    assert s3.faults[0].done == 8


def test_a_store_that_does_not_answer_says_nothing_about_a_checkpoint(s3: S3Server, store: ObjectStore) -> None:
    store.put("checkpoints/step-00000001-a0001/slices", [b"0123456789"])
    files = (WrittenFile("slices", 10, "0" * 32),)
    manifest = make_manifest(1, files=files)
    s3.faults.append(Fault("503", "GET", "slices", times=1000))
    with pytest.raises(ConnectionError, match="slices"):
        verify_files(store, manifest)
    s3.faults.clear()
    with pytest.raises(CheckpointError, match="is damaged: xxh3"):
        verify_files(store, manifest)


def test_a_creation_whose_answer_is_lost_counts_as_made(s3: S3Server, store: ObjectStore) -> None:
    s3.faults.append(Fault("lost", "PUT", "attempts/0001"))
    assert store.create_exclusive("attempts/0001.json", b"mine")
    assert s3.faults[0].done == 1
    assert store.read("attempts/0001.json") == b"mine"


def test_a_creation_that_came_too_late_does_not_count_although_it_was_repeated(
    s3: S3Server, store: ObjectStore
) -> None:
    assert store.create_exclusive("attempts/0001.json", b"theirs")
    s3.faults.append(Fault("lost", "PUT", "attempts/0001"))
    assert not store.create_exclusive("attempts/0001.json", b"mine")
    assert s3.faults[0].done == 1
    assert not store.create_exclusive("attempts/0001.json", b"theirs"), "the same bytes are not the same writer"


def test_half_a_body_is_not_taken_for_the_object(s3: S3Server, store: ObjectStore) -> None:
    data = os.urandom(100_000)
    store.create_exclusive("a", data)
    s3.faults.append(Fault("truncated", "GET", "run/a", times=2))
    assert store.read("a") == data
    s3.faults.append(Fault("truncated", "GET", "run/a"))
    assert store.read_range("a", 10, 50_000) == data[10:50_010]
    assert [fault.done for fault in s3.faults] == [2, 1]


def test_an_object_that_was_cut_is_a_checkpoint_error(s3: S3Server, store: ObjectStore) -> None:
    store.put("slices", [b"0123456789"])
    store.put("slices", [b"01234"])
    with pytest.raises(CheckpointError, match=r"run/slices ends at byte 5, expected 9"):
        store.read_range("slices", 3, 6)


def test_a_body_that_comes_slowly_is_waited_for(s3: S3Server, store: ObjectStore) -> None:
    store.create_exclusive("a", b"0123456789")
    s3.faults.append(Fault("slow", "GET", "run/a", slow_s=0.2))
    began = time.monotonic()
    assert store.read("a") == b"0123456789"
    assert time.monotonic() - began > 0.1


def test_large_objects_go_up_in_parts_that_are_each_tried_again(s3: S3Server, bucket: str, store: ObjectStore) -> None:
    data = os.urandom(2 * PART + 3)
    s3.faults += [
        Fault("503", "PUT", "partNumber=2", times=2),
        Fault("lost", "PUT", "partNumber=1"),
        Fault("lost", "POST", "uploadId="),  # the completion
    ]
    store.put("slices", (memoryview(data)[start : start + 999_999] for start in range(0, len(data), 999_999)))
    assert [fault.done for fault in s3.faults] == [2, 1, 1]
    assert store.read("slices") == data
    assert s3.unfinished_uploads(bucket) == 0


def test_an_upload_that_fails_half_way_is_given_up(s3: S3Server, bucket: str, store: ObjectStore) -> None:
    store.put("slices", [b"before"])

    def parts() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(PART)
        raise CheckpointError("the rank is gone")

    with pytest.raises(CheckpointError, match="the rank is gone"):
        store.put("slices", parts())
    s3.faults.append(Fault("503", "PUT", "partNumber=2", times=1000))
    with pytest.raises(OSError, match="slices"):
        store.put("slices", (bytes(PART) for _ in range(3)))
    assert s3.unfinished_uploads(bucket) == 0
    assert store.read("slices") == b"before"


def test_memory_of_an_upload_does_not_grow_with_it() -> None:
    def parts() -> Iterator[bytes]:
        yield from (bytes(100_000) for _ in range(10_000))

    tracemalloc.start()
    try:
        total = sum(len(chunk) for chunk in objects._chunks(parts()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 10**9
    assert peak < 4 * objects.CHUNK_BYTES


def test_a_bucket_that_is_not_there_does_not_look_empty(s3: S3Server) -> None:
    store = ObjectStore("s3://no-such-bucket/run", first_wait_s=0.001)
    for ask in (lambda: store.names(""), lambda: store.read("a"), lambda: store.create_exclusive("a", b"")):
        with pytest.raises(OSError, match="bucket does not exist") as caught:
            ask()
        assert not isinstance(caught.value, FileNotFoundError)


def _read_in_child(store: ObjectStore) -> None:
    os._exit(0 if store.read("a") == b"x" and store.create_exclusive("b", b"y") else 1)


def test_a_store_goes_on_in_a_forked_process(s3: S3Server, store: ObjectStore) -> None:
    assert store.create_exclusive("a", b"x")
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(store,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert store.read("b") == b"y"


def test_a_server_that_ignores_the_condition_is_refused(s3: S3Server, store: ObjectStore) -> None:
    check_exclusive_creation(store)
    s3.faults.append(Fault("unconditional", "PUT", "probe", times=2))
    with pytest.raises(StorageError, match="without exclusive creation is refused"):
        check_exclusive_creation(store)
    assert store.names("") == []


@pytest.mark.parametrize(
    "url",
    [
        "s3://USER:hidden@bucket/run",
        "s3://USER:hid/den@bucket/run",
        "s3://bucket/run?X-Amz-Signature=hidden",
        "https://user:hidden@host/run",
    ],
)
def test_secrets_in_a_url_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="environment") as caught:
        open_store(url)
    assert "hid" not in str(caught.value)
    assert "USER" not in str(caught.value)


@pytest.mark.parametrize("url", ["https://host/run", "sftp://host/run", "memory://run", "file:///tmp/run"])
def test_a_store_without_exclusive_creation_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="a store without exclusive creation is refused"):
        open_store(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///run", "s3://bucket/../other", "s3://bucket/a//b", "s3://b[0]/a"])
def test_an_address_that_names_no_folder_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        open_store(url)


def test_paths_and_urls_open_what_they_name() -> None:
    assert isinstance(open_store("runs/a"), LocalStore)
    for url in ("s3://bucket", "gs://bucket/runs", "az://container/runs", "abfs://c@account.dfs.core.windows.net/r"):
        assert open_store(f"{url}/").url == url  # type: ignore[attr-defined]


def test_a_library_that_is_missing_is_named() -> None:
    pytest.importorskip("s3fs")
    for url, package in (("gs://bucket/runs", "gcsfs"), ("az://container/runs", "adlfs")):
        if package not in _installed():
            with pytest.raises(ConfigError, match=f"pip install {package}"):
                open_store(url).read("a")


def _installed() -> set[str]:
    import importlib.util

    return {name for name in ("gcsfs", "adlfs") if importlib.util.find_spec(name)}
