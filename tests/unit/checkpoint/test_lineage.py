"""Which checkpoints count, and who may take an attempt number."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from dist_ft.checkpoint.lineage import Attempt, committed, follow, read_attempts, take_attempt
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

Ref = tuple[int, int]
"""(step, attempt)."""


def _manifest(ref: Ref) -> Manifest:
    step, attempt = ref
    return make_manifest(step, attempt)


def _attempts(starts: Sequence[Ref]) -> list[Attempt]:
    return [Attempt(number, step, attempt, 0.0) for number, (step, attempt) in enumerate(starts, start=1)]


ANEW = (0, 0)

CASES: dict[str, tuple[list[Ref], list[Ref], list[Ref]]] = {
    # name: (start of each attempt, everything committed, what counts)
    "no attempt": ([], [], []),
    "no attempt, yet a stray checkpoint": ([], [(10, 1)], []),
    "one attempt": ([ANEW], [(10, 1), (20, 1)], [(10, 1), (20, 1)]),
    "a new attempt that has committed nothing": ([ANEW, (20, 1)], [(10, 1), (20, 1)], [(10, 1), (20, 1)]),
    "a new attempt goes on": ([ANEW, (20, 1)], [(10, 1), (20, 1), (30, 2)], [(10, 1), (20, 1), (30, 2)]),
    "a zombie commits beyond the fork": ([ANEW, (20, 1)], [(20, 1), (30, 1), (30, 2)], [(20, 1), (30, 2)]),
    "only the zombie commits": ([ANEW, (20, 1)], [(20, 1), (30, 1), (40, 1)], [(20, 1)]),
    "a fork before the newest (it was damaged)": (
        [ANEW, (10, 1)],
        [(10, 1), (20, 1), (20, 2)],
        [(10, 1), (20, 2)],
    ),
    "a chain of three": (
        [ANEW, (20, 1), (40, 2)],
        [(10, 1), (20, 1), (30, 1), (30, 2), (40, 2), (50, 2), (50, 3)],
        [(10, 1), (20, 1), (30, 2), (40, 2), (50, 3)],
    ),
    "the third starts where the second did": (
        [ANEW, (20, 1), (20, 1)],
        [(10, 1), (20, 1), (30, 2), (30, 3)],
        [(10, 1), (20, 1), (30, 3)],
    ),
    "the third starts before the fork of the second": (
        [ANEW, (20, 1), (10, 1)],
        [(10, 1), (20, 1), (30, 2), (20, 3)],
        [(10, 1), (20, 3)],
    ),
    "the second restarts from scratch": ([ANEW, ANEW], [(10, 1), (20, 1), (10, 2)], [(10, 2)]),
    "the second restarts from scratch and has nothing": ([ANEW, ANEW], [(10, 1)], []),
    "the third skips an attempt": (
        [ANEW, ANEW, (10, 1)],
        [(10, 1), (10, 2), (20, 2), (20, 3)],
        [(10, 1), (20, 3)],
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_what_counts(case: str) -> None:
    starts, manifests, expected = CASES[case]
    found = follow(_attempts(starts), [_manifest(ref) for ref in reversed(manifests)])
    assert [(m.step, m.attempt) for m in found] == expected


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def _commit(store: LocalStore, ref: Ref) -> Manifest:
    manifest = _manifest(ref)
    assert store.create_exclusive(f"{manifest.directory}/manifest.json", manifest.encode())
    return manifest


def test_attempts_are_numbered_from_one_and_name_their_start(store: LocalStore) -> None:
    first = take_attempt(store, None)
    second = take_attempt(store, _commit(store, (20, 1)))
    assert (first.number, first.start_step, first.start_attempt) == (1, 0, 0)
    assert (second.number, second.start_step, second.start_attempt) == (2, 20, 1)
    assert read_attempts(store) == [first, second]
    assert store.names("attempts") == ["attempts/0001.json", "attempts/0002.json"]


def test_the_ten_thousandth_attempt_is_the_newest(store: LocalStore) -> None:
    store.create_exclusive("attempts/9999.json", _attempt_bytes(9999))
    assert take_attempt(store, None).number == 10_000
    assert take_attempt(store, None).number == 10_001


def test_of_drivers_at_the_same_moment_each_has_its_own_number_or_an_error(store: LocalStore) -> None:
    start = Barrier(8)

    def take(_: int) -> int | None:
        start.wait()
        try:
            return take_attempt(store, None).number
        except UsageError:
            return None

    with ThreadPoolExecutor(8) as pool:
        taken = [number for number in pool.map(take, range(8)) if number is not None]
    assert len(taken) == len(set(taken)) >= 1
    assert sorted(taken) == [attempt.number for attempt in read_attempts(store)]


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b'{"format_version":1,"number":2}', b"[]"])
def test_an_unreadable_attempt_is_an_error_not_a_guess(store: LocalStore, data: bytes) -> None:
    take_attempt(store, None)
    store.create_exclusive("attempts/0002.json", data)
    with pytest.raises(CheckpointError, match=r"attempts/0002\.json"):
        committed(store)


@pytest.mark.parametrize("what", ["null", "number", "later format"])
def test_an_attempt_of_another_format_is_an_error(store: LocalStore, what: str) -> None:
    later = _attempt_bytes(2).replace(b'"format_version":1', b'"format_version":2')
    store.create_exclusive("attempts/0002.json", {"null": b"null", "number": b"5"}.get(what, later))
    with pytest.raises(CheckpointError):
        read_attempts(store)


def test_other_files_beside_the_attempts_do_not_matter(store: LocalStore) -> None:
    attempt = take_attempt(store, None)
    store.create_exclusive("attempts/README", b"not an attempt")
    assert read_attempts(store) == [attempt]


def test_an_unreadable_manifest_is_passed_over_for_the_older_one(store: LocalStore) -> None:
    take_attempt(store, None)
    _commit(store, (10, 1))
    store.create_exclusive("checkpoints/step-00000020-a0001/manifest.json", b'{"format_version": 1, "st')
    assert [m.step for m in committed(store)] == [10]


def test_a_checkpoint_without_a_manifest_does_not_exist(store: LocalStore, tmp_path: Path) -> None:
    take_attempt(store, None)
    (tmp_path / "checkpoints/step-00000010-a0001").mkdir(parents=True)
    assert committed(store) == []


def test_a_directory_deleted_while_it_is_read_does_not_count(store: LocalStore) -> None:
    take_attempt(store, None)
    first, second = _commit(store, (10, 1)), _commit(store, (20, 1))
    store.delete(first.directory)
    assert committed(store) == [second]


@pytest.mark.timeout(10)
def test_an_attempt_that_starts_from_itself_is_an_error() -> None:
    with pytest.raises(CheckpointError):
        follow([replace(_attempts([ANEW])[0], start_attempt=1)], [])


def _attempt_bytes(number: int) -> bytes:
    return b'{"format_version":1,"number":%d,"start_step":0,"start_attempt":0,"started_at":0.0}' % number
