"""Files behind URLs: found, told apart, read by ranges; what passes by itself is tried again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dist_ft.errors import StorageError
from dist_ft.storage import remote
from dist_ft.storage.remote import find_remote, missing_package, open_remote, stat_remote
from dist_ft.storage.urls import shown_url, without_secrets
from tests.helpers.flaky_store import FlakyStore, flaky_store

CONTENT = bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)


@pytest.fixture
def store() -> Iterator[type[FlakyStore]]:
    with flaky_store(a_jsonl=CONTENT, b_jsonl=b"b", c_csv=b"") as made:
        yield made


class StatusError(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, url='https://h/a?X-Amz-Signature=abc123'")
        self.status = status


class NoCredentialsError(Exception):
    pass


def names(address: str) -> list[str]:
    return [file.address for file in find_remote(address)]


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("flaky://d/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("flaky://**/*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("flaky://d/[bc].*", ["b.jsonl", "c.csv"]),
        ("flaky://d", ["a.jsonl", "b.jsonl", "c.csv"]),
        ("flaky://d/", ["a.jsonl", "b.jsonl", "c.csv"]),
        ("flaky://d/b.jsonl", ["b.jsonl"]),
    ],
)
def test_files_are_found_by_name_pattern_and_folder(store: type[FlakyStore], address: str, found: list[str]) -> None:
    store().pipe("/d/.hidden.jsonl", b"x")
    assert [name.rpartition("/")[2] for name in names(address)] == found
    assert all(stat_remote(name).address == name for name in names(address))


def test_another_content_is_another_identity_and_another_name_too(store: type[FlakyStore]) -> None:
    a, b, _ = find_remote("flaky://d")
    assert find_remote("flaky://d")[0] == a == stat_remote(a.address)
    store().pipe("/d/a.jsonl", b"B" * len(CONTENT))
    assert stat_remote(a.address).identity != a.identity
    assert a.identity != b.identity


@pytest.mark.parametrize(("start", "count"), [(0, 10), (5, 0), (25_000, 10_000), (30_000, 5), (0, -1)])
def test_a_range_is_read_as_from_a_local_file(store: type[FlakyStore], start: int, count: int) -> None:
    with open_remote(stat_remote("flaky://d/a.jsonl")) as opened:
        assert opened.seek(start) == start
        assert opened.read(count) == CONTENT[start:][: count if count >= 0 else None]


def test_only_what_is_asked_for_is_read(store: type[FlakyStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
    with open_remote(stat_remote("flaky://d/a.jsonl")) as opened:
        opened.seek(20_000)
        opened.readline()
    assert store.ranges == [(20_000, 21_000)]


@pytest.mark.parametrize(
    "failure",
    [ConnectionResetError("reset"), TimeoutError(), StatusError(503), StatusError(429), OSError("SlowDown"), b"short"],
    ids=repr,
)
def test_what_passes_is_tried_again(store: type[FlakyStore], failure: Exception | bytes) -> None:
    file = stat_remote("flaky://d/a.jsonl")
    store.failures.extend([failure] * 6)
    with open_remote(file) as opened:
        assert opened.read() == CONTENT
    assert not store.failures


def test_what_does_not_pass_is_one_error_after_the_last_try(store: type[FlakyStore]) -> None:
    store.failures.extend([StatusError(503)] * 9)
    with pytest.raises(StorageError, match=r"^flaky://d/a.jsonl cannot be read after 7 tries: 503"):
        stat_remote("flaky://d/a.jsonl")
    assert len(store.failures) == 2


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (PermissionError("Forbidden"), "access is refused"),
        (StatusError(403), "access is refused"),
        (StatusError(401), "set the credentials of this store in the environment"),
        (NoCredentialsError("Unable to locate credentials"), "access is refused"),
        (FileNotFoundError("a.jsonl"), "a.jsonl: no such file"),
        (StatusError(400), "cannot be read after 1 try"),
    ],
)
def test_what_is_refused_is_not_asked_for_again(store: type[FlakyStore], failure: Exception, says: str) -> None:
    store.failures.extend([failure] * 2)
    with pytest.raises(StorageError, match=says) as caught:
        stat_remote("flaky://d/a.jsonl")
    assert len(store.failures) == 1
    assert "abc123" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [("flaky://d/*.parquet", "matches no files"), ("flaky://nowhere/*", "no such file or folder")],
)
def test_a_pattern_without_files_is_refused(store: type[FlakyStore], address: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        find_remote(address)


def test_a_listing_that_fails_is_no_shorter_list(store: type[FlakyStore]) -> None:
    store().pipe("/d/e/f.jsonl", b"x")
    whole = find_remote("flaky://d/**/*.jsonl")
    store.failures.append(OSError("SlowDown"))
    assert find_remote("flaky://d/**/*.jsonl") == whole
    store.failures.extend([OSError("SlowDown")] * 9)
    with pytest.raises(StorageError, match="cannot be read after 7 tries: SlowDown"):
        find_remote("flaky://d/**/*.jsonl")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("gs://b/x", "pip install dist-ft\\[gcs\\]"),
        ("az://b/x", "pip install dist-ft\\[azure\\]"),
        ("nothing://b/x", "no known kind of address"),
        ("zip://a::memory://b", "joined by `::`"),
    ],
)
def test_what_cannot_be_read_here_says_what_to_install(address: str, says: str) -> None:
    with pytest.raises(StorageError, match=says):
        find_remote(address)


@pytest.mark.parametrize("address", ["https://h/a", "memory://a", "hf://datasets/a/b"])
def test_what_can_be_read_needs_nothing(address: str) -> None:
    assert missing_package(address) is None


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:secret@h/a.jsonl", "https://***@h/a.jsonl"),
        ("https://token@h/a.jsonl", "https://***@h/a.jsonl"),
        ("https://h/a?id=5&X-Amz-Signature=s&sig=x&Key-Pair-Id=q", "https://h/a?id=5&X-Amz-Signature=***&sig=***&Key-Pair-Id=***"),
        ("s3://b/a@2.jsonl", "s3://b/a@2.jsonl"),
        ("abfs://data@account.dfs.core.windows.net/a", "abfs://data@account.dfs.core.windows.net/a"),
        ("hf://datasets/org/name@rev/a.jsonl", "hf://datasets/org/name@rev/a.jsonl"),
    ],
)  # fmt: skip
def test_no_secret_of_a_url_is_shown(address: str, shown: str) -> None:
    assert without_secrets(address) == shown_url(address) == shown
    assert shown_url(f"it said '{address}', twice") == f"it said '{shown}', twice"


def test_a_path_is_shown_as_it_is() -> None:
    assert without_secrets("data/a?token=b.jsonl") == "data/a?token=b.jsonl"
