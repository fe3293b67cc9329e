"""Deletion against readers, tags and kills: what somebody reads or has named is never half gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ft.checkpoint import holds
from dist_ft.checkpoint.cleaning import clean_up
from dist_ft.checkpoint.holds import Hold, add_tag, read_holds, read_tags, reading, remove_tag
from dist_ft.checkpoint.lineage import committed, take_attempt
from dist_ft.checkpoint.retention import RetentionRules
from dist_ft.errors import CheckpointError, UsageError
from dist_ft.storage.store import LocalStore
from tests.helpers.manifests import make_manifest

LAST = RetentionRules(1)


class Killed(BaseException):
    """The process dies here."""


class Store(LocalStore):
    """Counts changes, and does something before one of them."""

    num_changes = 0
    before: tuple[int, Callable[[], None]] | None = None

    def _changes(self) -> None:
        self.num_changes += 1
        if self.before is not None and self.num_changes == self.before[0]:
            self.before[1]()

    def put(self, name, parts) -> None:  # type: ignore[no-untyped-def]
        self._changes()
        super().put(name, parts)

    def create_exclusive(self, name: str, data: bytes) -> bool:
        self._changes()
        return super().create_exclusive(name, data)

    def delete(self, prefix: str) -> None:
        self._changes()
        super().delete(prefix)


def die() -> None:
    raise Killed


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    take_attempt(made, None)
    for step in (10, 20, 30):
        manifest = make_manifest(step)
        LocalStore.put(made, f"{manifest.directory}/slices.safetensors", [b"12345678"])
        LocalStore.create_exclusive(made, f"{manifest.directory}/manifest.json", manifest.encode())
    made.num_changes = 0
    return made


def steps(store: LocalStore) -> list[int]:
    """The checkpoints that readers see; each must have its slices."""
    found = committed(store)
    assert all(store.read(f"{m.directory}/slices.safetensors") == b"12345678" for m in found)
    return [m.step for m in found]


def folder(step: int) -> str:
    return make_manifest(step).directory


def test_a_clean_up_killed_anywhere_leaves_whole_checkpoints_and_the_next_one_ends_it(tmp_path: Path) -> None:
    num_kills = 0
    while True:
        root = tmp_path / str(num_kills)
        store = Store(root)
        take_attempt(store, None)
        for step in (10, 20, 30):
            LocalStore.put(store, f"{folder(step)}/slices.safetensors", [b"12345678"])
            LocalStore.create_exclusive(store, f"{folder(step)}/manifest.json", make_manifest(step).encode())
        store.num_changes, store.before = 0, (num_kills + 1, die)
        try:
            clean_up(store, LAST, 1)
        except Killed:
            assert steps(store)[-1] == 30
            clean_up(store, LAST, 1)
            num_kills += 1
        else:
            break
        assert steps(store) == [30]
        assert store.folders("checkpoints") == [folder(30)]
    assert num_kills == 4  # two marks, two deletions


def test_a_tagged_checkpoint_stays_until_the_tag_goes(store: Store) -> None:
    add_tag(store, "keep-me", folder(10), has_ended=False)
    add_tag(store, "keep-me", folder(10), has_ended=False)
    clean_up(store, LAST, 1)
    assert steps(store) == [10, 30]
    assert read_tags(store) == {"keep-me": folder(10)}
    remove_tag(store, "keep-me")
    clean_up(store, LAST, 1)
    assert steps(store) == [30]


def test_a_tag_names_one_checkpoint(store: Store) -> None:
    add_tag(store, "good", folder(10), has_ended=False)
    with pytest.raises(UsageError, match=f"good is the tag of {folder(10)} already"):
        add_tag(store, "good", folder(20), has_ended=False)
    with pytest.raises(UsageError, match="no tag other; there are: good"):
        remove_tag(store, "other")
    for name in ("", "../x", ".hidden", "a b", "x" * 101):
        with pytest.raises(UsageError, match="is no name"):
            add_tag(store, name, folder(10), has_ended=False)
    with pytest.raises(UsageError, match="is being deleted"):
        add_tag(store, "gone", folder(99), has_ended=False)
    assert [*read_tags(store)] == ["good"]


@pytest.mark.parametrize("change", [1, 2, 3])
def test_a_reader_that_comes_while_marks_are_written_or_after_sees_or_is_seen(store: Store, change: int) -> None:
    outcome = []

    def read() -> None:
        try:
            with reading(LocalStore(store.root), folder(10)):
                outcome.append("read")
                raise Killed  # the reader never gives it back, and the deleter goes on
        except Killed:
            pass
        except CheckpointError as error:
            outcome.append(str(error))

    # The reader dies as `Killed` only inside the block, so that its hold is written and given back.
    store.before = (change, read)
    clean_up(store, LAST, 1)
    if outcome == ["read"]:
        clean_up(store, LAST, 1)
    assert outcome[0] == "read" or "about to be deleted" in outcome[0]
    assert steps(store) == [30]


def test_a_tag_given_after_the_choice_and_before_the_marks_wins(store: Store) -> None:
    store.before = (1, lambda: add_tag(LocalStore(store.root), "late", folder(10), has_ended=False))
    clean_up(store, LAST, 1)
    assert steps(store) == [10, 30]
    assert not store.names(f"{folder(10)}/doomed")
    assert "doomed" not in " ".join(store.names("checkpoints"))


def test_a_tag_given_after_the_marks_is_refused(store: Store) -> None:
    said = []

    def tag() -> None:
        with pytest.raises(UsageError, match="is being deleted") as caught:
            add_tag(LocalStore(store.root), "late", folder(20), has_ended=False)
        said.append(caught)

    store.before = (3, tag)  # two marks were written
    clean_up(store, LAST, 1)
    assert said
    assert steps(store) == [30]
    assert read_holds(store) == {}


def test_a_mark_of_a_killed_run_does_not_keep_its_checkpoint_from_a_tag(store: Store) -> None:
    store.before = (3, die)
    with pytest.raises(Killed):
        clean_up(store, LAST, 1)
    with pytest.raises(UsageError):
        add_tag(store, "x", folder(20), has_ended=False)
    add_tag(store, "x", folder(20), has_ended=True)
    clean_up(store, LAST, 1)
    assert steps(store) == [20, 30]
    assert "doomed" not in " ".join(store.names("checkpoints"))


def test_a_reader_holds_what_it_reads_and_gives_it_back(store: Store) -> None:
    with reading(store, folder(10)):
        clean_up(store, LAST, 1)
        assert steps(store) == [10, 30]
    clean_up(store, LAST, 1)
    assert steps(store) == [30]
    assert store.names(holds.HOLDS) == []


def test_the_hold_of_a_dead_reader_ends(store: Store) -> None:
    store.create_exclusive(
        "holds/reader-1.json", b'{"format_version": 1, "directory": "%s", "until": 5.0}' % folder(10).encode()
    )
    assert read_holds(store, now=4.0) == {"reader-1": Hold(folder(10), 5.0)}
    clean_up(store, LAST, 1)
    assert steps(store) == [30]
    assert store.names(holds.HOLDS) == []


def test_a_hold_that_cannot_be_read_keeps_everything(store: Store) -> None:
    store.create_exclusive("holds/tag-x.json", b"[]")
    assert clean_up(store, LAST, 1) is None
    assert steps(store) == [10, 20, 30]


def test_a_run_that_may_only_be_read_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, data: bytes) -> bool:
        raise PermissionError(13, "read only")

    monkeypatch.setattr(store, "create_exclusive", refuse)
    with reading(store, folder(10)):
        assert store.read(f"{folder(10)}/slices.safetensors")
