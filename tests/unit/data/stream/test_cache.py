"""Copies of shards on a machine: whole or not at all, once for all ranks, within their limit."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from dist_ft.config.data_sections import LoaderConfig
from dist_ft.data.shards.shard_file import ARROW, INDEX, ShardInfo
from dist_ft.data.stream import cache as module
from dist_ft.data.stream.cache import Replica, ShardCache
from dist_ft.data.stream.order import Order
from dist_ft.data.stream.token_shards import TokenShards
from dist_ft.errors import DataError, DataUnavailableError, StorageError
from dist_ft.storage.store import LocalStore, Store
from tests.helpers.shards import Fault, Remote, places, write_shards


def make_cache(directory: Path, *stores: Any, gib: float = 1.0, max_tries: int = 4, ready_s: float = 0.0) -> ShardCache:
    found = [Replica(f"place-{index}", cast(Store, store)) for index, store in enumerate(stores)]
    loader = LoaderConfig(cache_dir=str(directory / "copies"), cache_gib=gib, max_tries=max_tries)
    return ShardCache(found, loader, ready_s, first_pause_s=0.001)


def copies(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "copies").iterdir() if not path.name.endswith(".lock"))


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    write_shards(tmp_path / "remote", [6] * 12)
    return tmp_path / "remote"


def test_a_directory_is_read_where_it_lies(tmp_path: Path, remote: Path) -> None:
    cache = make_cache(tmp_path, LocalStore(remote))
    assert cache.is_local
    assert cache.open(cache.info("s0"), ARROW).path == remote / "s0.arrow"
    assert not (tmp_path / "copies").exists()


def test_anything_else_is_copied_once_for_all_ranks_and_runs(tmp_path: Path, remote: Path) -> None:
    store = Remote(remote)
    for _ in range(3):
        cache = make_cache(tmp_path, store)
        file = cache.open(cache.info("s0"), ARROW)
        assert file.data.to_pybytes() == (remote / "s0.arrow").read_bytes()
        assert file.path.parent == tmp_path / "copies"
    assert not cache.is_local
    assert store.asked["s0.arrow"] == 1
    assert len(copies(tmp_path)) == 1


def test_ranks_that_ask_at_once_make_one_copy(tmp_path: Path, remote: Path) -> None:
    store = Remote(remote)
    info = make_cache(tmp_path, store).info("s0")
    barrier = threading.Barrier(8)

    def ask(_: int) -> bytes:
        cache = make_cache(tmp_path, store)
        barrier.wait(20)
        return cache.open(info, ARROW).data.to_pybytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {(remote / "s0.arrow").read_bytes()}
    assert store.asked["s0.arrow"] == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_whole_pass_is_read_through_a_small_cache(tmp_path: Path, remote: Path, world_size: int) -> None:
    """More data than the copies may take: they come and go, and every row is right."""
    limit = 5 * ((remote / "s0.arrow").stat().st_size + (remote / "s0.index.npy").stat().st_size)
    ids = list(Order([np.full(12, 6)], None, 0).locate(np.arange(144)))
    plain = TokenShards([f"s{n}" for n in range(12)], make_cache(tmp_path, LocalStore(remote)))
    for _ in range(world_size):
        shards = TokenShards(plain._keys, make_cache(tmp_path, Remote(remote), gib=limit / (1 << 30)))
        for i in ids:
            assert shards.read(i.shard, i.row)[0].tolist() == plain.read(i.shard, i.row)[0].tolist()
    assert sum((tmp_path / "copies" / name).stat().st_size for name in copies(tmp_path)) <= limit


def used_bytes(directory: Path) -> int:
    """Bytes of the copies, those under way too; one that is renamed meanwhile is counted once."""
    sizes = {}
    for entry in os.scandir(directory / "copies"):
        if not entry.name.endswith(".lock"):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def test_copies_made_at_once_never_take_more_than_the_limit(tmp_path: Path, remote: Path) -> None:
    limit = 2 * max((remote / f"s{n}.arrow").stat().st_size for n in range(6))
    pairs, used = threading.Barrier(2), []

    def in_pairs(name: str, nth: int, data: bytes) -> bytes:
        if name.endswith(ARROW):
            pairs.wait(60)  # two copies fit and get here; the others wait for their room
            used.append(used_bytes(tmp_path))
        return data

    caches = [make_cache(tmp_path, Remote(remote, in_pairs), gib=limit / (1 << 30)) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        files = list(pool.map(lambda n: caches[n].open(caches[n].info(f"s{n}"), ARROW), range(6)))
    assert [file.data.to_pybytes() for file in files] == [(remote / f"s{n}.arrow").read_bytes() for n in range(6)]
    assert len(used) == 6
    assert max(used) <= limit
    assert len(copies(tmp_path)) == 2


def test_a_copy_of_a_process_that_died_makes_room(tmp_path: Path, remote: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_die_while_copying, args=(str(tmp_path),))
    child.start()
    child.join(20)
    assert [name.startswith(".s0.") for name in copies(tmp_path)] == [True]
    size = (remote / "s1.arrow").stat().st_size
    cache = make_cache(tmp_path, Remote(remote), gib=size / (1 << 30))
    file = cache.open(cache.info("s1"), ARROW)
    assert copies(tmp_path) == [file.path.name]


def test_close_ends_the_wait_for_room(tmp_path: Path, remote: Path) -> None:
    size = max((remote / f"s{n}.arrow").stat().st_size for n in range(2))
    is_copying, may_end = threading.Event(), threading.Event()

    def slow(name: str, nth: int, data: bytes) -> bytes:
        if name.endswith(ARROW):
            is_copying.set()
            may_end.wait(60)
        return data

    first = make_cache(tmp_path, Remote(remote, slow), gib=size / (1 << 30))
    second = make_cache(tmp_path, Remote(remote), gib=size / (1 << 30))
    with ThreadPoolExecutor(2) as pool:
        copying = pool.submit(first.open, first.info("s0"), ARROW)
        is_copying.wait(60)
        waiting = pool.submit(second.open, second.info("s1"), ARROW)
        second.close()
        with pytest.raises(DataUnavailableError, match="was closed"):
            waiting.result(60)
        may_end.set()
        assert copying.result(60).data.size > 0


def test_the_copies_not_used_for_longest_go_first(tmp_path: Path, remote: Path) -> None:
    sizes = [(remote / f"s{n}.arrow").stat().st_size for n in range(4)]
    cache = make_cache(tmp_path, Remote(remote), gib=(sum(sizes) - 1) / (1 << 30))
    infos = [cache.info(f"s{n}") for n in range(4)]
    for age, info in enumerate(infos[:3]):
        path = cache.open(info, ARROW).path
        os.utime(path, (1000 + age, 1000 + age))
    cache.open(infos[0], ARROW)  # used again
    cache.open(infos[3], ARROW)
    assert [name[:2] for name in copies(tmp_path)] == ["s0", "s2", "s3"]


def test_other_files_of_the_cache_directory_are_left_alone(tmp_path: Path, remote: Path) -> None:
    (tmp_path / "copies").mkdir()
    for name in ("thesis.tex", "old.arrow", "model.index.npy"):
        (tmp_path / "copies" / name).write_bytes(b"x" * 10_000)
    size = (remote / "s0.arrow").stat().st_size
    cache = make_cache(tmp_path, Remote(remote), gib=1.5 * size / (1 << 30))
    for n in range(4):
        cache.open(cache.info(f"s{n}"), ARROW)
    assert {"thesis.tex", "old.arrow", "model.index.npy"} < set(copies(tmp_path))
    assert len(copies(tmp_path)) == 4


def test_a_shard_larger_than_the_limit_says_so(tmp_path: Path, remote: Path) -> None:
    cache = make_cache(tmp_path, Remote(remote), gib=1e-9)
    with pytest.raises(StorageError, match=r"data\.loader\.cache_gib=1e-09 is less than the one file s0\.arrow"):
        cache.open(cache.info("s0"), ARROW)


# Failures


def unavailable(name: str, nth: int, data: bytes) -> bytes:
    raise ConnectionError(f"503 for {name}")


def unavailable_twice(name: str, nth: int, data: bytes) -> bytes:
    return unavailable(name, nth, data) if nth < 3 else data


def cut_once(name: str, nth: int, data: bytes) -> bytes:
    return data[: len(data) // 2] if nth == 1 else data


def spoiled_once(name: str, nth: int, data: bytes) -> bytes:
    return data if nth > 1 or name.endswith(".json") else data[:-1] + b"?"


def spoiled(name: str, nth: int, data: bytes) -> bytes:
    return data if name.endswith(".json") else data[:-1] + b"?"


@pytest.mark.parametrize("fault", [unavailable_twice, cut_once, spoiled_once])
def test_what_passes_is_waited_for(tmp_path: Path, remote: Path, fault: Fault) -> None:
    cache = make_cache(tmp_path, Remote(remote, fault))
    info = cache.info("s0")
    for ending in (INDEX, ARROW):
        assert cache.open(info, ending).data.to_pybytes() == (remote / f"s0{ending}").read_bytes()


@pytest.mark.parametrize("fault", [unavailable, spoiled])
def test_a_place_that_fails_is_replaced_by_another(tmp_path: Path, remote: Path, fault: Fault) -> None:
    cache = make_cache(tmp_path, Remote(remote, fault), Remote(tmp_path / "nothing"), Remote(remote))
    assert cache.open(cache.info("s0"), ARROW).data.to_pybytes() == (remote / "s0.arrow").read_bytes()


def test_when_no_place_gives_it_each_is_named_with_its_reason(tmp_path: Path, remote: Path) -> None:
    info = make_cache(tmp_path, Remote(remote)).info("s0")
    stores = [Remote(remote, unavailable), Remote(tmp_path / "nothing"), Remote(remote, spoiled)]
    with pytest.raises(DataUnavailableError) as caught:
        make_cache(tmp_path, *stores, max_tries=3).open(info, ARROW)
    assert str(caught.value).startswith(
        "shard file s0.arrow cannot be read. place-0: ConnectionError: 503 for s0.arrow; place-1: it is not there; "
        f"place-2: DataError: {info.num_bytes} bytes came, but they are not those that were written"
    )
    assert [store.asked["s0.arrow"] for store in (stores[0], stores[2])] == [3, 3]
    assert copies(tmp_path) == []


def test_what_is_nowhere_is_not_asked_for_again(tmp_path: Path, remote: Path) -> None:
    store = Remote(remote)
    info = make_cache(tmp_path, store).info("s0")
    (remote / "s0.arrow").unlink()
    with pytest.raises(DataError, match=r"s0\.arrow is not at place-0; resume"):
        make_cache(tmp_path, store).open(info, ARROW)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "s0"}'])
def test_a_damaged_description_is_named(tmp_path: Path, remote: Path, text: str) -> None:
    (remote / "s0.json").write_text(text)
    with pytest.raises(DataError, match=r"s0\.json is damaged.*delete it and resume"):
        make_cache(tmp_path, LocalStore(remote)).info("s0")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_clear_error(
    tmp_path: Path, remote: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    store = Remote(remote)
    cache = make_cache(tmp_path, store)
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StorageError, match=r"data\.loader\.cache_dir=.*copies: .*; free some space"):
        cache.open(cache.info("s0"), ARROW)
    assert store.asked["s0.arrow"] == 1
    assert copies(tmp_path) == []


def test_a_cache_directory_that_cannot_be_made_is_named(tmp_path: Path, remote: Path) -> None:
    (tmp_path / "copies").write_text("a file")
    cache = make_cache(tmp_path, Remote(remote))
    with pytest.raises(StorageError, match=r"data\.loader\.cache_dir=.*copies"):
        cache.open(cache.info("s0"), ARROW)


# Kills and damage


def test_half_a_copy_of_one_that_was_killed_is_not_believed(tmp_path: Path, remote: Path) -> None:
    store = Remote(remote)
    cache = make_cache(tmp_path, store)
    info = cache.info("s0")
    path = cache.open(info, ARROW).path
    whole = path.read_bytes()
    path.rename(path.with_name(f".{path.name}.part"))
    path.write_bytes(whole[: len(whole) // 2])  # as of a disk that lost power
    assert make_cache(tmp_path, store).open(info, ARROW).data.to_pybytes() == whole
    assert copies(tmp_path) == [path.name]


def _die_while_copying(directory: str) -> None:
    def die(name: str, nth: int, data: bytes) -> bytes:
        return data if name.endswith(".json") else os._exit(9)  # type: ignore[return-value]

    cache = make_cache(Path(directory), Remote(Path(directory) / "remote", die))
    cache.open(cache.info("s0"), ARROW)


def test_a_process_that_dies_while_it_copies_leaves_no_lock(tmp_path: Path, remote: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_die_while_copying, args=(str(tmp_path),))
    child.start()
    child.join(20)
    assert child.exitcode == 9
    cache = make_cache(tmp_path, Remote(remote))
    file = cache.open(cache.info("s0"), ARROW)
    assert file.data.to_pybytes() == (remote / "s0.arrow").read_bytes()
    assert copies(tmp_path) == [file.path.name]


def test_a_copy_that_rots_is_copied_anew(tmp_path: Path, remote: Path) -> None:
    store = Remote(remote)
    cache = make_cache(tmp_path, store)
    path = cache.open(cache.info("s0"), ARROW).path
    path.write_bytes(b"\0" * path.stat().st_size)
    shards = TokenShards(["s0"], make_cache(tmp_path, store))
    plain = TokenShards(["s0"], make_cache(tmp_path, LocalStore(remote)))
    assert [shards.read(*p)[0].tolist() for p in places(plain)] == [plain.read(*p)[0].tolist() for p in places(plain)]
    assert store.asked["s0.arrow"] == 2


def test_a_shard_that_was_prepared_anew_with_other_bytes_is_another_copy(tmp_path: Path, remote: Path) -> None:
    cache = make_cache(tmp_path, Remote(remote))
    cache.open(cache.info("s0"), ARROW)
    write_shards(remote, [6], seed=9)
    assert cache.open(cache.info("s0"), ARROW).data.to_pybytes() == (remote / "s0.arrow").read_bytes()
    assert len(copies(tmp_path)) == 2


# Shards that come late


def test_a_shard_is_waited_for_until_its_description_is_there(tmp_path: Path, remote: Path) -> None:
    hidden = (remote / "s3.json").rename(remote / "hidden")

    class Late(Remote):
        def read(self, name: str) -> bytes:
            self.asked[name] += 1
            if self.asked[name] == 3:
                hidden.rename(remote / "s3.json")
            return self.inner.read(name)

    found = make_cache(tmp_path, Late(remote), ready_s=60).info("s3")
    assert isinstance(found, ShardInfo)
    assert found.key == "s3"


def test_a_wait_has_a_limit(tmp_path: Path, remote: Path) -> None:
    with pytest.raises(DataUnavailableError, match=r"shard s99 was not prepared within 0\.02 s \(looked at place-0\)"):
        make_cache(tmp_path, Remote(remote), ready_s=0.02).info("s99")


def test_without_a_wait_a_missing_shard_is_an_error_at_once(tmp_path: Path, remote: Path) -> None:
    with pytest.raises(DataError, match=r"shard s99 is not at place-0, place-1; resume"):
        make_cache(tmp_path, Remote(remote), LocalStore(remote)).info("s99")


def test_close_ends_retries(tmp_path: Path, remote: Path) -> None:
    cache = make_cache(tmp_path, Remote(remote, unavailable), max_tries=10**6)
    asking = ThreadPoolExecutor(1).submit(cache.info, "s0")
    cache.close()
    with pytest.raises(DataUnavailableError, match="was closed"):
        asking.result(20)
